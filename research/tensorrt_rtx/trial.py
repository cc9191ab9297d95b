"""Does ONNX Runtime's TensorRT-RTX plug-in run here, and are its int8 and fp8 products faster than fp16?

    pip install onnxruntime-gpu onnxruntime-ep-nv-tensorrt-rtx-cu13 onnx ml_dtypes
    python trial.py --out results/NAME [--rows 512,4096] [--seconds 400]
    python trial.py --rehearse                     any machine: the plug-in is found, every model is built and checked

Chains of products 1920 ↔ 7680 in fp16, in stock QDQ (int8, fp8 E4M3, both operands, scales of whole tensors) and with
int4 weights in blocks of 128, as `../cuda_ops/bench.py` has them. Each form runs under the plug-in and under the CUDA
provider in a process of its own. Inputs and outputs pass through the host, so what is stated is a difference: a chain
of `LONG` rounds through the same eight weights minus a chain of one, divided by `LONG` − 1; median of the runs, and the
range that least and greatest give. Outputs are compared with fp16 under the CUDA provider. What fails is written down
with its first line, and the next form goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

NARROW, WIDE, LAYERS = 1920, 7680, 8
LONG = 9
BLOCK = 128
FORMS = ("fp16", "fp8", "int8", "int4")
PROVIDERS = ("rtx", "cuda")
WARM_UP, RUNS = 3, 10
OPSET = 23


def weights() -> list[np.ndarray]:
    """Eight matrices (K, N) float32, of the size that keeps a chain's values about 1."""
    rng = np.random.default_rng(0)
    shapes = [(NARROW, WIDE), (WIDE, NARROW)] * (LAYERS // 2)
    return [(rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for shape in shapes]


def chain(form: str, rounds: int, matrices: list[np.ndarray]) -> bytes:
    """The model: x (M, 1920) fp16 → y of the same shape, `rounds` times through all matrices."""
    import ml_dtypes
    import onnx
    from onnx import TensorProto as T
    from onnx import helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, value: np.ndarray, kind: int | None = None) -> str:
        if kind is None:
            constants.append(numpy_helper.from_array(value, name))
        else:
            constants.append(helper.make_tensor(name, kind, value.shape, value.tobytes(), raw=True))
        return name

    for i, matrix in enumerate(matrices):
        if form == "fp16":
            constant(f"w{i}", matrix.astype(np.float16))
        elif form == "int4":
            blocks = matrix.reshape(-1, BLOCK, matrix.shape[1])
            scale = (np.abs(blocks).max(axis=1) / 7).astype(np.float16)
            codes = np.clip(np.rint(blocks / scale[:, None].astype(np.float32)), -8, 7).astype(np.int8).reshape(-1)
            packed = ((codes[0::2] & 15) | (codes[1::2] << 4)).astype(np.uint8)
            constants.append(helper.make_tensor(f"q{i}", T.INT4, matrix.shape, packed.tobytes(), raw=True))
            constant(f"s{i}", scale)
            inputs = [f"q{i}", f"s{i}"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"w{i}"], axis=0, block_size=BLOCK))
        else:
            greatest, kind = (448.0, T.FLOAT8E4M3FN) if form == "fp8" else (127.0, T.INT8)
            scale = np.float16(np.abs(matrix).max() / greatest)
            scaled = matrix / np.float32(scale)
            codes = (
                np.clip(scaled, -greatest, greatest).astype(ml_dtypes.float8_e4m3fn)
                if form == "fp8"
                else np.clip(np.rint(scaled), -127, 127).astype(np.int8)
            )
            constant(f"q{i}", codes, kind)
            constant(f"s{i}", np.asarray(scale))
            constant(f"z{i}", np.zeros((), codes.dtype), kind)
            nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", f"z{i}"], [f"w{i}"]))
    if form in ("fp8", "int8"):
        # Inputs are standard normal; six deviations are represented.
        constant("sx", np.float16(6.0 / (448.0 if form == "fp8" else 127.0)))
        kind = T.FLOAT8E4M3FN if form == "fp8" else T.INT8
        constant("zx", np.zeros((), ml_dtypes.float8_e4m3fn if form == "fp8" else np.int8), kind)
    value = "x"
    for step in range(rounds * len(matrices)):
        read = value
        if form in ("fp8", "int8"):
            nodes.append(helper.make_node("QuantizeLinear", [value, "sx", "zx"], [f"c{step}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"c{step}", "sx", "zx"], [f"d{step}"]))
            read = f"d{step}"
        value = "y" if step == rounds * len(matrices) - 1 else f"h{step}"
        nodes.append(helper.make_node("MatMul", [read, f"w{step % len(matrices)}"], [value]))
    ports = [helper.make_tensor_value_info(name, T.FLOAT16, ["M", NARROW]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, form, ports[:1], ports[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
    return model.SerializeToString() if rounds > 1 else _checked(onnx, model)


def _checked(onnx: Any, model: Any) -> bytes:
    onnx.checker.check_model(model)
    return model.SerializeToString()


@functools.cache
def devices() -> tuple[Any, ...]:
    """Register the plug-in, once in a process; the devices it offers to run on."""
    import onnxruntime
    import onnxruntime_ep_nv_tensorrt_rtx as plug_in

    name = plug_in.get_ep_name()
    onnxruntime.register_execution_provider_library(name, plug_in.get_library_path())
    return tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == name)


def session(provider: str, model: bytes) -> Any:
    """A session under the plug-in (`rtx`), the CUDA provider, or, to rehearse, the CPU's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if provider == "rtx":
        found = list(devices())
        if not found:
            raise RuntimeError("the plug-in was registered and offers no device here")
        options.add_provider_for_devices(found, {})
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return onnxruntime.InferenceSession(model, options)
    if provider == "cuda":
        onnxruntime.preload_dlls()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    named = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[provider]
    return onnxruntime.InferenceSession(model, options, providers=[named])


def timed(made: Any, x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Output, and milliseconds of each run."""
    y, times = made.run(None, {"x": x})[0], []
    for i in range(WARM_UP + RUNS):
        begin = time.perf_counter()
        made.run(None, {"x": x})
        if i >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - begin))
    return y, times


def part(connection: Any, provider: str, form: str, rows: tuple[int, ...]) -> None:
    """One form under one provider; sends a row for each number of rows, or the first line of what failed."""
    try:
        matrices = weights()
        begin = time.perf_counter()
        short, long = (session(provider, chain(form, rounds, matrices)) for rounds in (1, LONG))
        load_s = time.perf_counter() - begin
        for m in rows:
            x = np.random.default_rng(1).standard_normal((m, NARROW)).astype(np.float16)
            (y, once), (_, often) = timed(short, x), timed(long, x)
            per = [(statistics.median(often) - statistics.median(once)) / (LONG - 1)]
            per += [(min(often) - max(once)) / (LONG - 1), (max(often) - min(once)) / (LONG - 1)]
            us = dict(zip(("us", "us_low", "us_high"), (round(1e3 * value, 1) for value in per), strict=True))
            row = {"provider": provider, "form": form, "rows": m, **us, "load_s": round(load_s, 1)}
            connection.send((row, y))
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        connection.send(({"provider": provider, "form": form, "failed": text}, None))


def measured(provider: str, form: str, rows: tuple[int, ...], seconds: float) -> list[tuple[dict[str, Any], Any]]:
    """The rows of a part, in a process that may crash or hang without taking the others along."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=part, args=(there, provider, form, rows))
    process.start()
    there.close()
    found, deadline = [], time.monotonic() + seconds
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            found.append(here.recv())
    except EOFError:
        pass
    process.join(1)
    if process.is_alive():
        process.kill()
        found.append(({"provider": provider, "form": form, "failed": f"killed after {seconds:.0f} s"}, None))
    elif process.exitcode:
        found.append(({"provider": provider, "form": form, "failed": f"crashed with {process.exitcode}"}, None))
    return found


def described() -> dict[str, Any]:
    """Versions, and what the plug-in says of itself."""
    import onnxruntime

    found: dict[str, Any] = {"onnxruntime": onnxruntime.__version__}
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plug_in

        found["plug_in"] = plug_in.__version__
        found["devices"] = [f"{d.ep_vendor} {d.device.type} {d.device.device_id:#x}" for d in devices()]
    except Exception as error:
        found["plug_in_failed"] = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    try:
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    except Exception as error:
        found["gpu"] = f"none that torch sees ({type(error).__name__})"
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="stem of the .json and .md")
    parser.add_argument("--rows", default="512,4096")
    parser.add_argument("--seconds", type=float, default=100, help="of one form under one provider, then it is killed")
    parser.add_argument("--rehearse", action="store_true", help="build and check the models, ask the plug-in")
    args = parser.parse_args()
    report: dict[str, Any] = {**described(), "rows": []}
    print(json.dumps(report), flush=True)
    if args.rehearse:
        matrices = weights()
        for form in FORMS:
            print(form, f"{len(chain(form, 1, matrices)) / 1e6:.0f} MB", flush=True)
        return
    rows = tuple(int(m) for m in args.rows.split(","))
    reference: dict[int, np.ndarray] = {}
    for provider in reversed(PROVIDERS):
        for form in FORMS:
            for row, y in measured(provider, form, rows, args.seconds):
                if y is not None:
                    wanted = reference.setdefault(row["rows"], y.astype(np.float64))
                    row["off_fp16"] = float(f"{np.linalg.norm(y - wanted) / np.linalg.norm(wanted):.2g}")
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    write(args.out, report)


def write(stem: Path, report: dict[str, Any]) -> None:
    """Both files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# TensorRT-RTX plug-in {report.get('plug_in', report.get('plug_in_failed'))}, {report['gpu']}", ""]
    lines += ["µs of eight products 1920 ↔ 7680 (range); off: relative L2 from fp16 under CUDA.", ""]
    lines += ["| provider | form | rows | µs | off | |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        us = f"{row['us']} ({row['us_low']} … {row['us_high']})" if "us" in row else ""
        cells = (row["provider"], row["form"], row.get("rows", ""), us, row.get("off_fp16", ""), row.get("failed", ""))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
