"""What torch loses on processors that are not Intel's: MKL takes a path of half speed there, ONNX Runtime does not.

    python benchmarks/mkl_path.py BUNDLE… --out benchmarks/results/mkl_path

torch's x86 wheels multiply float32 matrices by MKL, which asks whose processor it is. A shared library of two functions
that answer "Intel", preloaded, has it take its AVX-512 path. Here with and without, each in processes of their own:

- GFLOP/s of torch's linear layers, and of ONNX Runtime's MatMul, by shape, on one thread
- `qexport bench BUNDLE --against fp32,eager,compile`: what is left of the bundles' lead over torch

Linux on x86 with a C compiler. Figures of this project are made without the library unless they say otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qexport.verify.environment import describe_environment

SHIM = "int mkl_serv_intel_cpu(void) { return 1; }\nint mkl_serv_intel_cpu_true(void) { return 1; }\n"
AS_SHIPPED, AS_INTEL = "as shipped", "told it is Intel's"
SHAPES = ((512, 768, 3072), (512, 3072, 768), (6400, 256, 1024), (6400, 1024, 256))
"""Rows, inputs, outputs: an MLP of DiT-B/2, and one of dit-c10-d4 over 100 samples."""

BENCH = (*["--provider", "cpu", "--threads", "2", "--target", "portable", "--against", "fp32,eager,compile", "--json"],)

GEMM = """
import json, sys, time, numpy, onnxruntime, torch
from onnx import TensorProto, helper
torch.set_num_threads(1)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
def rate(run, flops):
    run(), run()
    found = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        found.append(flops / (time.perf_counter() - start) / 1e9)
    return found
rows = []
for m, k, n in json.loads(sys.argv[1]):
    x, weight = torch.randn(m, k), torch.randn(n, k)
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    held = helper.make_tensor("w", TensorProto.FLOAT, (k, n), weight.T.contiguous().numpy().tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value("x", m, k)],
                              [value("y", m, n)], [held])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": x.numpy()}
    with torch.no_grad():
        ours = rate(lambda: torch.nn.functional.linear(x, weight), 2 * m * k * n)
    rows.append([ours, rate(lambda: session.run(None, feeds), 2 * m * k * n)])
print(json.dumps(rows))
"""


def environments(folder: Path) -> dict[str, dict[str, str]]:
    """The environment as it is, and with the library preloaded."""
    source, library = folder / "intel.c", folder / "libintel.so"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return {AS_SHIPPED: dict(os.environ), AS_INTEL: {**os.environ, "LD_PRELOAD": str(library)}}


def gemm(ways: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Rates by shape and way: quartiles of 20 runs, in GFLOP/s."""
    found = {}
    for way, environment in ways.items():
        command = [sys.executable, "-c", GEMM, json.dumps(SHAPES)]
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[way] = json.loads(answer.stdout)
    return [
        {"shape": shape, "way": way, "engine": engine, "gflops": statistics.quantiles(found[way][row][column], n=4)}
        for row, shape in enumerate(SHAPES)
        for way in ways
        for column, engine in enumerate(("torch", "onnxruntime"))
    ]


def benches(bundles: list[Path], ways: dict[str, dict[str, str]], runs: int, batch: str) -> list[dict[str, Any]]:
    """What `qexport bench` reports, by bundle and way."""
    rows = []
    for bundle in bundles:
        for way, environment in ways.items():
            command = ["qexport", "bench", str(bundle), *BENCH, "--runs", str(runs), "--batch", batch]
            answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for contender in json.loads(answer.stdout)["contenders"]:
                for size, measured in contender["batches"].items():
                    rows.append(
                        {
                            "bundle": bundle.name,
                            "way": way,
                            "contender": contender["name"],
                            "batch": int(size),
                            "ms": measured["latency_ms"]["total"],
                            "times_as_fast_as": measured["times_as_fast_as"],
                        }
                    )
    return rows


def table(result: dict[str, Any]) -> str:
    """Both parts as Markdown."""
    lines = [
        f"# torch's matrix products on this processor ({result['environment']['cpu']})",
        "",
        "One thread, GFLOP/s, median (quartiles) of 20 runs.",
        "",
    ]
    lines += ["| rows × inputs × outputs | MKL | torch | ONNX Runtime |"]
    lines += ["|---|---|---|---|"]
    for shape in SHAPES:
        for way in (AS_SHIPPED, AS_INTEL):
            cells = []
            for engine in ("torch", "onnxruntime"):
                (row,) = (
                    r for r in result["gemm"] if (tuple(r["shape"]), r["way"], r["engine"]) == (shape, way, engine)
                )
                low, middle, high = row["gflops"]
                cells.append(f"{middle:.0f} ({low:.0f}–{high:.0f})")
            lines.append(f"| {' × '.join(map(str, shape))} | {way} | " + " | ".join(cells) + " |")
    lines += ["", "Two threads, milliseconds, median (quartiles); ratios are of runs in the same turn.", ""]
    lines += ["| bundle | batch | MKL | contender | ms | × eager | × compile |", "|---|---|---|---|---|---|---|"]
    for row in sorted(result["bench"], key=lambda row: (row["bundle"], row["batch"])):
        ratios = [row["times_as_fast_as"].get(base) for base in ("torch eager", "torch.compile")]
        cells = [row["bundle"], str(row["batch"]), row["way"], row["contender"]]
        cells.append(f"{row['ms']['median']:.4g} ({row['ms']['p25']:.4g}–{row['ms']['p75']:.4g})")
        cells += [f"{ratio['median']:.2f}" if ratio else "–" for ratio in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = environments(Path(folder))
        result = {
            "environment": describe_environment("cpu"),
            "load_average": os.getloadavg()[0],
            "gemm": gemm(ways),
            "bench": benches(options.bundles, ways, options.runs, options.batch),
        }
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
