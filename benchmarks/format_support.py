"""What ONNX Runtime makes of each format on this machine: which kernel, how exact, how fast.

    python benchmarks/format_support.py [--provider cpu|cuda] [--anew]

One linear layer, 1024 inputs and 1024 outputs, as a bundle holds it: DequantizeLinear over packed weights, with or
without QuantizeLinear/DequantizeLinear on its input, under the session options of `qexport.targets`. Scales of inputs
are constants (static), come through a port of the graph (per step), or are computed (per token). For each form and
option set: the operators that are left after optimisation, the relative L2 from float64 arithmetic on the very same
integers, and the median processor time at 1 and 256 rows on one thread beside fp32, in turns (CUDA: wall time). Rows
that are there are kept unless --anew is given; each states the load average of the machine. Writes
results/format_support-PROVIDER.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from qexport.formats import NumberFormat, get_format
from qexport.numerics.affine import absmax_scales, quantize_symmetric
from qexport.numerics.packing import pack
from qexport.numerics.quantized import QuantizedTensor
from qexport.runtime.session import choose_provider, first_line
from qexport.scheme import Granularity, PerChannel, PerGroup, TensorSpec
from qexport.solution import LEAST_TOKEN_SCALE
from qexport.targets import QuantTraits, session_config
from qexport.verify.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
WIDTH = 1024
ROWS = (1, 256)
RUNS, WARM_UP = 30, 3
WEIGHTS: tuple[tuple[str, Granularity], ...] = (
    ("int8", PerChannel()), ("int8", PerGroup(32)), ("int6", PerChannel()), ("int4", PerGroup(32)),
    ("int4", PerGroup(128)), ("int4", PerChannel()), ("int3", PerGroup(32)), ("int2", PerGroup(32)),
    ("fp8-e4m3", PerChannel()), ("fp8-e4m3", PerGroup(32)), ("fp8-e5m2", PerChannel()),
)  # fmt: skip
INTEGERS, INT8, FP8 = {"int8", "int6", "int4", "int2"}, "int8", "fp8-e4m3"
ACTIVATIONS: dict[tuple[str | None, str], set[str]] = {
    (None, ""): {name for name, _ in WEIGHTS},
    (INT8, "static"): INTEGERS, (INT8, "per step"): INTEGERS, (INT8, "per token"): INTEGERS,
    (FP8, "static"): {FP8}, (FP8, "per step"): {FP8}, (FP8, "per token"): {FP8},
}  # fmt: skip
"""Formats of inputs and what shares a scale, and the formats of weights that are tried with them."""
NUMPY_FLOATS = {"fp8-e4m3": ml_dtypes.float8_e4m3fn, "fp8-e5m2": ml_dtypes.float8_e5m2}


def layer(weight: QuantizedTensor, activation: NumberFormat | None, scales_of: str, scale: float) -> onnx.ModelProto:
    """x (rows, WIDTH) → y, the layer as qexport writes it; per step, `xs` () is an input of the graph."""
    spec = weight.spec
    codes = np.ascontiguousarray(weight.codes.T)
    packed = pack(codes, spec.format.container_bits).tobytes()
    grouped = isinstance(spec.granularity, PerGroup)
    scales = np.ascontiguousarray(weight.scales.T) if grouped else weight.scales.reshape(-1)
    attributes: dict[str, Any] = {"axis": 1}
    if isinstance(spec.granularity, PerGroup):
        attributes = {"axis": 0, "block_size": spec.granularity.size}
    constants = [
        helper.make_tensor("w", _onnx_type(spec.format), codes.shape, packed, raw=True),
        helper.make_tensor("s", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True),
    ]
    nodes = [
        helper.make_node("Cast", ["s"], ["sf"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["w", "sf"], ["wf"], **attributes),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in ("x", "y")]
    given = ports[:1]
    source = "x"
    if activation is not None and scales_of == "per token":
        constants += [
            helper.make_tensor("axis", TensorProto.INT64, (1,), [1]),
            helper.make_tensor("greatest", TensorProto.FLOAT, (), [activation.greatest]),
            helper.make_tensor("least", TensorProto.FLOAT, (), [LEAST_TOKEN_SCALE]),
            helper.make_tensor("flat", TensorProto.INT64, (2,), [-1, WIDTH]),
        ]
        to: dict[str, Any] = {"axis": 0, "output_dtype": _onnx_type(activation)}
        nodes += [
            helper.make_node("Reshape", ["x", "flat"], ["xf"]),
            helper.make_node("Abs", ["xf"], ["magnitude"]),
            helper.make_node("ReduceMax", ["magnitude", "axis"], ["most"], keepdims=0),
            helper.make_node("Div", ["most", "greatest"], ["ratio"]),
            helper.make_node("Max", ["ratio", "least"], ["xs"]),
            helper.make_node("QuantizeLinear", ["xf", "xs"], ["xq"], **to),
            helper.make_node("DequantizeLinear", ["xq", "xs"], ["xr"], axis=0),
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Reshape", ["xr", "shape"], ["xd"]),
        ]
        source = "xd"
    elif activation is not None:
        if scales_of == "per step":
            given = [*given, helper.make_tensor_value_info("xs", TensorProto.FLOAT, [])]
        else:
            constants.append(helper.make_tensor("xs", TensorProto.FLOAT, (), [scale]))
        constants.append(helper.make_tensor("xz", _onnx_type(activation), (), b"\0", raw=True))
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        ]
        source = "xd"
    nodes.append(helper.make_node("MatMul", [source, "wf"], ["y"]))
    graph = helper.make_graph(nodes, "layer", given, ports[1:], constants)
    opset = max(23, spec.format.min_opset)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13)
    onnx.checker.check_model(model, full_check=True)
    return model


def plain(weight_OI: np.ndarray) -> onnx.ModelProto:
    """The same layer in fp32."""
    constant = helper.make_tensor("w", TensorProto.FLOAT, weight_OI.T.shape, weight_OI.T.tobytes(), raw=True)
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", WIDTH]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "plain", ports[:1], ports[1:], [constant]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=13)


def quantised_input(x: np.ndarray, activation: NumberFormat, scales_of: str, scale: float) -> np.ndarray:
    """Integers or small floats times the scale, float64; independent of the code under test."""
    step = np.float32(scale)
    if scales_of == "per token":
        step = np.abs(x).max(axis=1, keepdims=True) / np.float32(activation.greatest)
    quotient = x / step
    if activation.kind == "int":
        return np.clip(np.rint(quotient), activation.code_min, activation.code_max).astype(np.float64) * step
    limited = np.clip(quotient, -activation.float_max, activation.float_max)
    return limited.astype(NUMPY_FLOATS[activation.name]).astype(np.float64) * step


def traits_of(weight: str, activation: str | None, scales_of: str) -> QuantTraits:
    """What session options know of such a layer, as `qexport.runtime` reads it off a manifest."""
    if activation is None:
        return QuantTraits(weight_only=frozenset({weight}))
    known = activation == INT8 and scales_of != "per token"
    return QuantTraits(
        with_activations=frozenset({weight}),
        activations=frozenset({activation}),
        per_token=scales_of == "per token",
        integer=known and weight in {"int8", "int6"},
        two_bit=known and weight == "int2",
    )


def session(model: onnx.ModelProto, provider: str, options: str, traits: QuantTraits, folder: Path) -> Any:
    config = session_config(provider, "exact" if options == "exact" else "serve", traits)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = 1
    for key, value in config.entries.items():
        settings.add_session_config_entry(key, value)
    settings.optimized_model_filepath = str(folder / "optimised.onnx")
    chosen = (config.provider, dict(config.provider_options))
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=[chosen], enable_fallback=0)


def medians_ms(sessions: dict[str, tuple[Any, dict[str, np.ndarray]]], provider: str) -> dict[str, float]:
    """Of each session on its inputs, run in turns; a CPU's processor time, which other work hardly changes."""
    clock = time.process_time if provider == "cpu" else time.perf_counter
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(RUNS + WARM_UP):
        for name, (made, feeds) in sessions.items():
            start = clock()
            made.run(None, feeds)
            if turn >= WARM_UP:
                spent[name].append((clock() - start) * 1e3)
    return {name: round(float(np.median(times)), 4) for name, times in spent.items()}


def measure(provider: str, kept: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    w_OI = (random.standard_normal((WIDTH, WIDTH)) / 32).astype(np.float32)
    inputs = {rows: random.standard_normal((rows, WIDTH)).astype(np.float32) for rows in ROWS}
    greatest = float(max(np.abs(x).max() for x in inputs.values()))
    found = []
    for (activation, scales_of), formats in ACTIVATIONS.items():
        for name, granularity in WEIGHTS:
            if name not in formats:
                continue
            spec = TensorSpec(get_format(name), granularity)
            scales = absmax_scales(w_OI, spec)
            weight = QuantizedTensor(quantize_symmetric(w_OI, scales, spec), scales, spec)
            traits = traits_of(name, activation, scales_of)
            act = get_format(activation) if activation else None
            scale = greatest / act.greatest if act else 1.0
            model = layer(weight, act, scales_of, scale)
            for options in ("exact", "serve"):
                row = {"weight": str(spec), "activation": activation, "scales": scales_of, "options": options}
                if _key(row) in kept:
                    found.append(kept[_key(row)] | row)
                    continue
                result = run(model, plain(w_OI), provider, options, traits, weight, act, scales_of, inputs, scale)
                found.append(row | result | {"load_average": round(os.getloadavg()[0], 1)})
                print(found[-1], flush=True)
    return found


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows of before scales were told apart are of static ones."""
    scales = row.get("scales", "static" if row["activation"] else "")
    return row["weight"], row["activation"], scales, row["options"]


def run(
    model: onnx.ModelProto,
    fp32: onnx.ModelProto,
    provider: str,
    options: str,
    traits: QuantTraits,
    weight: QuantizedTensor,
    activation: NumberFormat | None,
    scales_of: str,
    inputs: dict[int, np.ndarray],
    scale: float,
) -> dict[str, Any]:
    more = {"xs": np.array(scale, np.float32)} if scales_of == "per step" else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            reference = session(fp32, provider, options, QuantTraits(), Path(folder))
            made = session(model, provider, options, traits, Path(folder))
            left = [node.op_type for node in onnx.load(Path(folder) / "optimised.onnx").graph.node]
            result: dict[str, Any] = {"operators": left}
            x = inputs[max(ROWS)]
            y = made.run(None, {"x": x, **more})[0].astype(np.float64)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            return {"error": first_line(error)}
        known = quantised_input(x, activation, scales_of, scale) if activation else x.astype(np.float64)
        wanted = known @ weight.dequantize().T.astype(np.float64)
        result["relative_l2"] = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
        for rows, values in inputs.items():
            both = {"ms": (made, {"x": values, **more}), "fp32_ms": (reference, {"x": values})}
            result |= {f"{name}_{rows}": ms for name, ms in medians_ms(both, provider).items()}
    return result


def table(rows: list[dict[str, Any]], provider: str) -> str:
    lines = [
        f"# Formats under ONNX Runtime, {provider}",
        "",
        f"Made by `python benchmarks/format_support.py --provider {provider}`. One layer 1024 → 1024; time on one",
        "thread against fp32 in turns, at 1 and 256 rows (below 1 is faster); the CPU's is processor time. Error:",
        "relative L2 from float64 arithmetic on the same integers, so what the kernel adds to the rounding that was",
        "asked for. Load: of the machine, whose caches are shared, which still roughens ratios.",
        "",
        "| weights | inputs | options | what runs | error | time, 1 row | 256 rows | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["weight"],
            f"{row['activation']} {row['scales']}" if row["activation"] else "float",
            row["options"],
        ]
        if "error" in row:
            cells += [f"fails: {row['error'][:80]}", "", "", ""]
        else:
            times = [row[f"ms_{n}"] / row[f"fp32_ms_{n}"] for n in ROWS]
            cells += [" → ".join(row["operators"]), f"{row['relative_l2']:.1e}", *(f"{t:.2f}" for t in times)]
        cells.append(f"{row['load_average']:.0f}" if "load_average" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _onnx_type(number_format: NumberFormat) -> int:
    return int(TensorProto.DataType.Value(number_format.onnx_type or ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--anew", action="store_true", help="measure rows again that are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    provider = choose_provider(options.provider)
    file = options.out / f"format_support-{provider}.json"
    there = json.loads(file.read_text())["rows"] if file.exists() and not options.anew else []
    rows = measure(provider, {_key(row): row for row in there})
    data = {"environment": describe_environment(provider), "width": WIDTH, "runs": RUNS, "rows": rows}
    file.write_text(json.dumps(data, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows, provider))


if __name__ == "__main__":
    main()
