"""What a convolution takes on the CPU provider in float32 and in every int8 form that ONNX has.

    python benchmarks/convolutions.py [--repeats 5] [--out benchmarks/results/convolutions]

One operator with bias, batch 1, one thread, of the shapes of an autoencoder for 256 pixels; random numbers. Times with
the quantiser of the input, and what follows up to float32. The forms take turns; processor time, median, and the median
of the ratio to float32 of the same turn, so that a busy machine measures about the same.

    inputs           Q/DQ on the input, int8 weight behind DQ: ONNX Runtime's own choice of kernels
    inputs, folded   the same with `session.disable_quant_qdq`, as bundles are loaded: floats on rounded inputs
    ConvInteger      sums of products of codes, and two operators to make floats of them
    QLinearConv      the output is int8, too
    …, uint8         the same with `session.x64quantprecision`: uint8 weights, where uint8 · int8 would saturate
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

SHAPES = ((512, 32, 3), (256, 64, 3), (128, 128, 3), (512, 32, 1))
"""Channels in and out, side of the map, side of the window."""

X = "float[1, C, S, S] x"
QUANTISED = "q = QuantizeLinear (x, sx, z)"
FORMS = {
    "float32": "y = Conv <WINDOW> (x, wf, b)",
    "inputs": f"{QUANTISED} d = DequantizeLinear (q, sx, z) v = DequantizeLinear <axis = 0> (w, sw, zw) "
    "y = Conv <WINDOW> (d, v, b)",
    "ConvInteger": f"{QUANTISED} i = ConvInteger <WINDOW> (q, w, z) f = Cast <to = 1> (i) m = Mul (f, sxw) "
    "y = Add (m, bb)",
    "QLinearConv": f"{QUANTISED} i = QLinearConv <WINDOW> (q, sx, z, w, sw, zw, sy, z, bi) "
    "y = DequantizeLinear (i, sy, z)",
}  # fmt: skip
FOLDED, UINT8 = "inputs, folded", "QLinearConv, uint8"


def session(channels: int, side: int, window: int, form: str, entries: dict[str, str]) -> onnxruntime.InferenceSession:
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (channels, channels, window, window)).astype(np.int8)
    sw = rng.uniform(5e-4, 1e-3, channels).astype(np.float32)
    b, sx, sy = rng.normal(size=channels).astype(np.float32), np.float32(0.03), np.float32(0.1)
    zero = np.int8(0) if form == "inputs" else np.uint8(128)
    column = (-1, 1, 1)
    constants = {
        "w": w, "sw": sw, "b": b, "sx": sx, "sy": sy, "z": zero, "zw": np.zeros(channels, np.int8),
        "wf": w * sw.reshape(-1, 1, 1, 1), "sxw": (sx * sw).reshape(column), "bb": b.reshape(column),
        "bi": np.rint(b / (sx * sw)).astype(np.int32),
    }  # fmt: skip
    window_text = f"kernel_shape = [{window}, {window}], pads = {[window // 2] * 4}"
    body = FORMS[form].replace("WINDOW", window_text)
    x = X.replace("C", str(channels)).replace("S", str(side))
    model = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({x}) => (float[A, B, D, E] y) {{ {body} }}'
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items() if n in used)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure(channels: int, side: int, window: int, repeats: int) -> dict[str, dict[str, float]]:
    sessions = {form: session(channels, side, window, form, {}) for form in FORMS}
    sessions[FOLDED] = session(channels, side, window, "inputs", {"session.disable_quant_qdq": "1"})
    sessions[UINT8] = session(channels, side, window, "QLinearConv", {"session.x64quantprecision": "1"})
    x = np.random.default_rng(1).normal(size=(1, channels, side, side)).astype(np.float32)
    times: dict[str, list[float]] = {form: [] for form in sessions}
    for turn in range(repeats + 1):
        for form, one in sessions.items():
            start = time.process_time()
            one.run(None, {"x": x})
            if turn:  # the first warms up
                times[form].append((time.process_time() - start) * 1e3)
    base = np.array(times["float32"])
    return {
        form: {"ms": float(np.median(spent)), "of_float32": float(np.median(np.array(spent) / base))}
        for form, spent in times.items()
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    options = arguments.parse_args()
    rows = [((c, s, k), measure(c, s, k, options.repeats)) for c, s, k in SHAPES]
    load_average = os.getloadavg()[0]
    names = list(rows[0][1])
    lines = [
        "# One convolution, CPU provider, one thread: ms (× float32)", "",
        f"`python benchmarks/convolutions.py`, ONNX Runtime {onnxruntime.__version__}; load average at the end "
        f"{load_average:.1f} on {os.cpu_count()} processors.", "",
        "| channels, map, window | " + " | ".join(names) + " |", "|---|" + "---|" * len(names),
    ]  # fmt: skip
    for (channels, side, window), found in rows:
        cells = [f"{row['ms']:.1f} ({row['of_float32']:.2f})" for row in found.values()]
        lines.append(f"| {channels}, {side} × {side}, {window} × {window} | " + " | ".join(cells) + " |")
    if options.out:
        data = {"load_average": load_average, "repeats": options.repeats, "onnxruntime": onnxruntime.__version__,
                "rows": [{"shape": list(shape), "forms": found} for shape, found in rows]}  # fmt: skip
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
