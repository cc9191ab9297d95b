"""What a matrix product takes on the CPU provider in float32 and in int8, with and without an option.

    python benchmarks/int8_products.py [--threads 1] [--repeats 20] [--out benchmarks/results/int8_products]

W8A8 as bundles have it: the input rounded by one scale, weights int8 with a scale per output channel; ONNX Runtime
makes QuantizeLinear and MatMulIntegerToFloat of it. `session.x64quantprecision` turns weights into uint8, because
uint8 · int8 saturates in 16 bits on processors without VNNI. The forms take turns; milliseconds by the clock, median,
and the median of float32's over them in the same turn, so above 1 is faster. The error is the greatest difference from
exact integer arithmetic in float64 (float32: from float64), relative to the greatest number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import numpy_helper, parser

from qexport.targets.processor import sums_exactly
from qexport.verify.environment import describe_environment

SHAPES = ((1, 1024, 4096), (64, 1024, 4096), (512, 768, 3072), (512, 3072, 768), (6400, 256, 1024), (6400, 1024, 256))
"""Rows, inputs, outputs: steps of var-d16, the MLP of DiT-B/2, and that of dit-c10-d4 over 100 samples."""

BODIES = {
    "float32": "y = MatMul (x, wf)",
    "int8": "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) v = DequantizeLinear <axis = 1> (w, sw, zw) "
    "y = MatMul (d, v)",
}  # fmt: skip
FORMS = {"float32": ("float32", {}), "int8": ("int8", {}), "int8, option": ("int8", {"session.x64quantprecision": "1"})}
WARM_UP, SCALE = 3, np.float32(0.03)


def measure(rows: int, inputs: int, outputs: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row of the table for each form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w, sw = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8), rng.uniform(5e-4, 1e-3, outputs)
    sw = sw.astype(np.float32)
    codes = np.clip(np.rint(x / SCALE), -128, 127).astype(np.float64)
    exact = codes @ w.astype(np.float64) * sw * np.float64(SCALE)
    constants = {"w": w, "sw": sw, "zw": np.zeros(outputs, np.int8), "s": SCALE, "z": np.int8(0), "wf": w * sw}
    sessions = {}
    for form, (body, entries) in FORMS.items():
        model = parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21]> '
            f"g (float[{rows},{inputs}] x) => (float[{rows},{outputs}] y) {{ {BODIES[body]} }}"
        )
        read = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in read
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        for key, value in {"session.intra_op.allow_spinning": "0", **entries}.items():
            options.add_session_config_entry(key, value)
        sessions[form] = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(WARM_UP + repeats):
        for form, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"x": x})
            if turn >= WARM_UP:
                times[form].append(time.perf_counter() - start)
    found = []
    for form, session in sessions.items():
        wanted = x.astype(np.float64) @ constants["wf"].astype(np.float64) if form == "float32" else exact
        error = np.abs(session.run(None, {"x": x})[0] - wanted).max() / np.abs(wanted).max()
        ratios = [base / own for base, own in zip(times["float32"], times[form], strict=True)]
        found.append({
            "shape": [rows, inputs, outputs], "form": form, "ms": statistics.median(times[form]) * 1e3,
            "times_as_fast": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios),
            "error": float(error),
        })  # fmt: skip
    return found


def markdown(report: dict[str, Any]) -> str:
    """The rows as a table."""
    cpu, vnni = report["environment"]["cpu"], "with" if report["vnni"] else "without"
    lines = [
        f"# int8 products on the CPU provider: {cpu}, {vnni} VNNI, {report['threads']} thread(s)",
        "",
        "Made by `python benchmarks/int8_products.py`; its header says how. × float32: above 1 is faster; least and",
        f"greatest of {report['repeats']} turns. Load average at the end {report['load_average']:.1f}.",
        "",
        "| rows, inputs, outputs | form | ms | × float32 | error |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        shape = " × ".join(map(str, row["shape"]))
        ratio = f"{row['times_as_fast']:.2f} ({row['least']:.2f}–{row['greatest']:.2f})"
        lines.append(f"| {shape} | {row['form']} | {row['ms']:.2f} | {ratio} | {row['error']:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser_ = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser_.add_argument("--threads", type=int, default=1)
    parser_.add_argument("--repeats", type=int, default=20)
    parser_.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    args = parser_.parse_args()
    rows = [row for shape in SHAPES for row in measure(*shape, args.threads, args.repeats)]
    report = {
        "command": "python benchmarks/int8_products.py", "threads": args.threads, "repeats": args.repeats,
        "vnni": sums_exactly(), "load_average": os.getloadavg()[0], "environment": describe_environment("cpu"),
        "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
