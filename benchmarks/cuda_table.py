"""The CUDA table: this project's own bundles, lowered to ort-cuda, against torch, on the device at hand.

    python benchmarks/cuda_table.py --out benchmarks/results/cuda_table       on a machine with a GPU
    python benchmarks/cuda_table.py --rehearse                                on any: small, on the CPU, no claim

DiT-XL/2: one forward of the denoising graph for 1, 8 and 32 images (the batch inside is twice that: 2, 16, 64). VAR:
whole images, batch 1, 8 and 32. Forms: fp16, W8A16, W4A16, W8A8 in int8 and fp8, two also with `--optimize latency`
for the largest batch, each lowered with float16 compute, each forward also under a CUDA graph (everything bound, one
graph id a batch); torch eager and torch.compile (reduce-overhead) in the same run. Weights are random numbers of the
published shapes; speed does not depend on them. Every form has a process of its own. A row holds median, least and
greatest of its runs, the memory that the device lost to it, and how many heavy nodes fell back to the CPU (must be
none); without a GPU it says "not measured on CUDA".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
TARGET = "ort-cuda"
UNMEASURED = "not measured on CUDA"

FORMS: dict[str, tuple[int, int, str, bool]] = {
    "fp16": (16, 16, "int", False),
    "W8A16": (8, 16, "int", False),
    "W4A16": (4, 16, "int", False),
    "W4A16, --optimize latency": (4, 16, "int", True),
    "W8A8-int8": (8, 8, "int", False),
    "W8A8-int8, --optimize latency": (8, 8, "int", True),
    "W8A8-fp8": (8, 8, "fp8", False),
}
"""Bits of weights and activations, the number format, and whether forms are chosen for the largest batch."""

TORCH = ("torch eager fp16", "torch.compile fp16")


@dataclass(frozen=True)
class Subject:
    """A model; `forward` names the graph of which one call is timed, None times whole images."""

    name: str
    forward: str | None
    batches: tuple[int, ...]
    random: bool = True


SUBJECTS = (
    Subject("dit-xl-2-256", "denoise", (1, 8, 32)),
    Subject("var-d16", None, (1, 8, 32)),
    Subject("var-d30", None, (1, 8, 32)),
)
REHEARSAL = (
    Subject("dit-c10-d2", "denoise", (1, 2), random=False),
    Subject("var-c10-d2", None, (1, 2), random=False),
)


@dataclass(frozen=True)
class Runs:
    """How often: warm-up, then timed."""

    warmup: int
    timed: int


# In children --------------------------------------------------------------------------------------------------------


def device_bytes() -> int | None:
    """Memory of the device that is taken, by anyone; None without a device."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def timed(run: Callable[[], object], runs: Runs) -> dict[str, Any]:
    """Milliseconds of a call that has finished its work when it returns."""
    for _ in range(runs.warmup):
        run()
    seconds = []
    for _ in range(runs.timed):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    ms = [value * 1e3 for value in seconds]
    return {"ms": round(statistics.median(ms), 3), "ms_min": round(min(ms), 3), "ms_max": round(max(ms), 3)}


def forward_rows(bundle: Path, subject: Subject, provider: str, captured: bool, runs: Runs) -> dict[str, Any]:
    """One call of a graph at each batch, all inputs and outputs bound; `captured`: as a CUDA graph."""
    import onnxruntime

    from qexport.bundle import Bundle
    from qexport.runtime.runtime import quant_traits
    from qexport.runtime.session import make_session
    from qexport.targets import ort_cuda, session_config

    opened = Bundle.open(bundle, check="size")
    graph = str(subject.forward)
    config = session_config(provider, "serve", quant_traits(opened.manifest, graph))
    if captured:
        config = ort_cuda.captured(config)
    session = make_session(opened.graph_files(TARGET)[graph], opened.path, config)
    found = {}
    for batch in subject.batches:
        binding = session.io_binding()
        kept = []  # a CUDA graph replays on the addresses that it saw
        for name, array in feeds(session, batch).items():
            kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, config.device, 0))
            binding.bind_ortvalue_input(name, kept[-1])
        for output in session.get_outputs():
            binding.bind_output(output.name, config.device, 0)
        session.run_with_iobinding(binding)
        if captured:
            for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
                kept.append(value)
                binding.bind_ortvalue_output(output.name, value)
        options = onnxruntime.RunOptions()
        if captured:
            options.add_run_config_entry("gpu_graph_id", str(batch))

        def run(binding: Any = binding, options: Any = options) -> None:
            session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        found[str(batch)] = timed(run, runs)
    return found


def feeds(session: Any, batch: int) -> dict[str, np.ndarray]:
    """Something for every input: noise, class 1, timesteps and scales of 1."""
    rng = np.random.default_rng(SEED)
    found = {}
    for port in session.get_inputs():
        shape = [batch if isinstance(size, str) else size for size in port.shape]
        if "int64" in port.type:
            found[port.name] = np.ones(shape, np.int64)
        elif port.name == "row" or not shape:
            found[port.name] = np.ones(shape, np.float32)
        else:
            found[port.name] = rng.normal(size=shape).astype(np.float32)
    return found


def image_rows(bundle: Path, subject: Subject, provider: str, runs: Runs) -> dict[str, Any]:
    """Whole images at each batch."""
    from qexport.runtime import load

    runtime = load(bundle, provider=provider, target=TARGET, check="size")
    classes = runtime.bundle.manifest.model.num_classes

    def image(batch: int) -> Callable[[], object]:
        return lambda: runtime.generate([i % classes for i in range(batch)], batch=batch)

    return {str(batch): timed(image(batch), runs) for batch in subject.batches}


def torch_rows(subject: Subject, device: str, compiled: bool, runs: Runs) -> dict[str, Any]:
    """The same work in torch: a denoiser's weights are fp16, a VAR's run under autocast."""
    import torch

    from qexport.reference.backend import TorchBackend
    from qexport.runtime import Player

    generator = load_model(subject)
    half = device == "cuda"
    for spec in generator.graphs:
        spec.module.to(device)
        if half and spec.name == subject.forward:
            spec.module.half()
        if compiled:
            torch._dynamo.config.capture_scalar_outputs = True
            torch._dynamo.config.recompile_limit = 64
            spec.module.compile(mode="reduce-overhead" if device == "cuda" else "default")

    class OnDevice(TorchBackend):
        """Values stay on the device."""

        def put(self, array: np.ndarray) -> torch.Tensor:
            return super().put(array).to(device)

        def get(self, value: torch.Tensor) -> np.ndarray:
            return super().get(value.float().cpu())

        def zeros(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            return super().zeros(shape, dtype).to(device)

        def run(self, graph: str, feeds: Any, outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
            with autocast(device, half and graph != subject.forward):
                found = super().run(graph, feeds, outputs)
            return {name: value.clone() for name, value in found.items()} if compiled else found

    backend = OnDevice(generator)
    found = {}
    for batch in subject.batches:
        if subject.forward is None:
            player = Player(generator.plan, backend, generator.tables)
            labels = [i % generator.entry.num_classes for i in range(batch)]
            found[str(batch)] = timed(lambda player=player, labels=labels: player.play({"label": labels}), runs)
            continue
        spec = generator.graph(subject.forward)
        values = {name: backend.put(array) for name, array in torch_feeds(spec, batch).items()}
        outputs = tuple(port.name for port in spec.outputs)

        def forward(values: Mapping[str, torch.Tensor] = values, outputs: tuple[str, ...] = outputs) -> None:
            backend.run(str(subject.forward), values, outputs)
            if device == "cuda":
                torch.cuda.synchronize()

        found[str(batch)] = timed(forward, runs)
    return found


def torch_feeds(spec: Any, batch: int) -> dict[str, np.ndarray]:
    """As `feeds`, for a graph's torch module."""
    rng = np.random.default_rng(SEED)
    found = {}
    for port in spec.inputs:
        shape = [batch if isinstance(size, str) else size for size in port.shape]
        real = rng.normal(size=shape) if shape and port.name != "row" else np.ones(shape)
        found[port.name] = np.ones(shape, np.int64) if port.dtype == "int64" else np.asarray(real, port.dtype)
    return found


@contextlib.contextmanager
def autocast(device: str, wanted: bool) -> Iterator[None]:
    import torch

    with torch.autocast(device, torch.float16) if wanted else contextlib.nullcontext():
        yield


def fallback_nodes(bundle: Path, provider: str) -> int | None:
    """Nodes of weight that ran on the CPU although another provider was asked for; None on the CPU itself."""
    if provider == "cpu":
        return None
    from qexport.bundle import Bundle
    from qexport.verify.placement import HEAVY_OPS, measure_placement

    placement = measure_placement(Bundle.open(bundle, check="size"), provider, ("serve",), TARGET)
    return sum(op in HEAVY_OPS for _, op, _ in placement.fallback)


def load_model(subject: Subject) -> Any:
    from qexport.family import find_model, load_random

    if subject.random:
        return load_random(subject.name, SEED)
    family, entry = find_model(subject.name)
    return family.load(entry, None, None)


def make_bundle(subject: Subject, form: str, folder: str) -> dict[str, Any]:
    """Quantise with a calibration that is just enough for scales, and lower with float16 compute."""
    from qexport.bundle import Bundle
    from qexport.lower import lower
    from qexport.pipeline import quantize
    from qexport.request import Request
    from qexport.scheme import preset

    wbits, abits, number_format, optimised = FORMS[form]
    request = Request(preset(wbits, abits, number_format=number_format), samples=1)
    quantize(subject.name, request=request, random_weights=SEED if subject.random else None, out=folder)
    report = lower(folder, TARGET, optimize="latency" if optimised else None, batch=max(subject.batches))
    return {"size_bytes": Bundle.open(folder, "size").size_bytes, "added_bytes": report.added_bytes}


def work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        before = device_bytes()
        result = function(*arguments)
        after = device_bytes()
        pipe.send({"result": result, "device_bytes": None if before is None or after is None else after - before})
    except Exception as error:  # the table says so and goes on
        pipe.send({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"})


# In this process ----------------------------------------------------------------------------------------------------


def in_a_process(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What a function returns in a process of its own, or why it failed."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=work, args=(end, function, arguments))
    process.start()
    end.close()
    try:
        found = pipe.recv()
    except EOFError:
        found = {"failed": "its process ended without an answer"}
    process.join()
    return found


def measure(subject: Subject, provider: str, runs: Runs, folder: Path, torch_too: bool) -> list[dict[str, Any]]:
    """Rows of one model."""
    rows: list[dict[str, Any]] = []

    def add(form: str, answer: dict[str, Any], **more: Any) -> None:
        for batch in map(str, subject.batches):
            timing = answer["result"][batch] if "result" in answer else {"failed": answer["failed"]}
            row = {"model": subject.name, "form": form, "batch": int(batch), **timing, **more}
            rows.append({**row, "device_bytes": answer.get("device_bytes")})
            print(json.dumps(rows[-1]), flush=True)

    for form in FORMS:
        bundle = folder / f"{subject.name}-{form}"
        made = in_a_process(make_bundle, subject, form, str(bundle))
        if "failed" in made:
            add(form, made)
            continue
        fallback = in_a_process(fallback_nodes, bundle, provider).get("result")
        facts = {**made["result"], "fallback": fallback}
        if subject.forward is None:
            add(form, in_a_process(image_rows, bundle, subject, provider, runs), **facts)
            continue
        add(form, in_a_process(forward_rows, bundle, subject, provider, False, runs), **facts)
        if provider == "cuda":
            add(f"{form}, CUDA graph", in_a_process(forward_rows, bundle, subject, provider, True, runs), **facts)
    if torch_too:
        for form in TORCH:
            add(form, in_a_process(torch_rows, subject, provider, form == TORCH[1], runs))
    return rows


COLUMNS = ("model", "form", "batch", "ms", "ms_min", "ms_max", "device_bytes", "size_bytes", "fallback", "failed")


def markdown(report: dict[str, Any]) -> str:
    """The report as one table."""
    lines = [f"# {report['device']}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in report["rows"]:
        cells = ["–" if row.get(column) is None else str(row[column]) for column in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def device_name(provider: str) -> str:
    if provider != "cuda":
        return f"rehearsal on the CPU: {UNMEASURED}"
    import torch

    return torch.cuda.get_device_name()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="comma-separated; all by default")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--no-torch", action="store_true", help="leave torch eager and torch.compile out")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU; proves that the command runs")
    parser.add_argument("--folder", type=Path, help="where bundles are made, some 10 GB; a temporary one by default")
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    args = parser.parse_args(argv)
    from qexport.runtime.session import choose_provider
    from qexport.verify.environment import describe_environment

    provider = "cpu" if args.rehearse else choose_provider("cuda")  # says what is missing, and stops
    subjects = REHEARSAL if args.rehearse else SUBJECTS
    if args.models:
        subjects = tuple(subject for subject in subjects if subject.name in args.models.split(","))
    runs = Runs(1, 2) if args.rehearse else Runs(args.warmup, args.runs)
    report: dict[str, Any] = {
        "command": "python benchmarks/cuda_table.py",
        "device": device_name(provider),
        "environment": describe_environment(provider),
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="qexport-cuda-table-") as temporary:
        for subject in subjects:
            report["rows"] += measure(subject, provider, runs, args.folder or Path(temporary), not args.no_torch)
            if args.out:  # after each model: a lease may end
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
                args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
