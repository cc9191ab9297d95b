"""Which CUDA kernels one call of a lowered graph runs, how often, and for how long.

    python benchmarks/cuda_kernels.py BUNDLE [--graph denoise] [--batch 1] [--top 20]

Runs under ONNX Runtime with everything bound and no CUDA graph, watched by torch's profiler (CUPTI), which sees every
kernel of the process. Sums are of kernels; what lies between them is not in it. Not for VAR's `step`, whose free sizes
`cuda_parts.feeds` does not know.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch
from cuda_parts import TARGET, feeds
from torch.profiler import ProfilerActivity, profile

from qexport.bundle import Bundle
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import make_session
from qexport.targets import session_config

WARM_UP, CALLS = 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="lowered to ort-cuda")
    parser.add_argument("--graph", default="denoise")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--top", type=int, default=20, help="kernels that are listed")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    torch.zeros(1, device="cuda")
    bundle = Bundle.open(args.bundle, "size")
    config = session_config("cuda", "serve", quant_traits(bundle.manifest, args.graph))
    session = make_session(bundle.graph_files(TARGET)[args.graph], bundle.path, config)
    binding, kept = session.io_binding(), []
    for name, array in feeds(session, args.batch).items():
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        binding.bind_ortvalue_input(name, kept[-1])
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)
    for _ in range(WARM_UP):
        session.run_with_iobinding(binding)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(CALLS):
            session.run_with_iobinding(binding)
        torch.cuda.synchronize()
    found = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found) / CALLS
    print(f"{args.bundle.name} {args.graph}, batch {args.batch}: {total:.0f} µs of kernels a call")
    for event in found[: args.top]:
        us, count = event.self_device_time_total, event.count
        print(f"{us / CALLS:9.1f} µs  {count / CALLS:6.1f} × {us / count:8.2f}  {event.key[:100]}")


if __name__ == "__main__":
    main()
