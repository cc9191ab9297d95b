"""Accuracy, then speed, of the fp8 operators under ONNX Runtime CUDA, beside stock fp16 operators and torch.

One run measures everything on one device; each part that fails is recorded with its error and the next goes on.
`--rehearse` builds and checks every model at small sizes without a GPU. Writes STEM.json, STEM.md and STEM.log (what
cublasLt was asked and chose, and the runtime's warnings).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import forms
import torch  # before onnxruntime: its wheel brings the CUDA libraries
from forms import Form
from reference import FP16_LIMIT, Agreement, compare
from report import Report, environment, write
from runtime import Runtime
from timing import captured, fp16_chain, measure, scaled_mm
from workload import BLOCK_TOKENS, Sizes, block_inputs, make_block, make_chain, plus_one, torch_block, torch_weights

CHAIN_ROWS = (2, 16, 128, 512, 4096, 16384)
BLOCK_ROWS = (512, 4096, 16384)
CHECK_ROWS = (2, 17, 512)  # 17: not a multiple of 16
CHAIN_FORMS = (
    Form("ORT fp16 MatMul", "stock"),
    Form("ORT Fp8Linear", "linear"),
    Form("ORT Fp8Linear, fast accumulation", "linear", fast_accum=True),
    Form("ORT Fp8Linear, per-channel", "linear", per_channel=True),
    Form("ORT Fp8Linear, fp8 between", "fused"),
    Form("ORT Fp8Linear, fp8 between, fast accumulation", "fused", fast_accum=True),
)
BLOCK_FORMS = (
    Form("ORT fp16 stock", "stock"),
    Form("ORT Fp8Linear, stock norm", "linear"),
    Form("ORT ModulatedNormFp8 + Fp8Linear", "fused"),
    Form("ORT ModulatedNormFp8 + Fp8Linear, fast accumulation", "fused", fast_accum=True),
    Form("ORT ModulatedNormFp8 + Fp8Linear, per-channel", "fused", per_channel=True),
)


def check_accuracy(report: Report, runtime: Runtime, sizes: Sizes, device: str, rows: tuple[int, ...]) -> None:
    """Check every operator of every fp8 form on its own operands, and each model's result against exact arithmetic."""
    layers = make_chain(sizes, device)
    block_layers, norm_scales = make_block(sizes, device)

    def record(model_name: str, form: Form, found: list[Agreement]) -> None:
        for agreement in found:
            row = {"model": model_name, "form": form.name, **asdict(agreement), "passes": agreement.passes}
            report.accuracy.append(row)
            if not agreement.passes:
                print(f"ACCURACY {row}", flush=True)

    for form in CHAIN_FORMS:
        for count in rows if form.kind != "stock" else ():
            with report.part(f"accuracy chain {form.name} M={count}"):
                model, probes = forms.chain(layers[:3], form, probe=True)
                generator = torch.Generator().manual_seed(count)
                x = torch.randn((1, count, sizes.narrow), generator=generator).half().to(device)
                values = runtime.values(model, {"x": x})
                record("chain", form, [compare(probe, values) for probe in probes])
    for form in BLOCK_FORMS:
        for count in rows if form.kind != "stock" else ():
            with report.part(f"accuracy block {form.name} M={2 * count}"):
                model, probes = forms.block(block_layers, norm_scales, form, probe=True)
                inputs = block_inputs(sizes, 2, count, device)
                fed = inputs if form.kind == "fused" else plus_one(inputs)
                values = runtime.values(model, fed)
                record("block", form, [compare(probe, values) for probe in probes])
                held = torch_weights(block_layers, torch.float64, device)
                want = torch_block(held, {n: t.double() for n, t in inputs.items()})
                for out, key in (("qkv.y", "qkv"), ("y", "y")):
                    whole = float((values[out].double() - want[key]).norm() / want[key].norm())
                    report.accuracy.append(
                        {"model": "block", "form": form.name, "name": f"whole block: {key}", "rows": 2 * count,
                         "rel_same_operands": None, "rel_unquantised": whole, "limit": None, "passes": None}
                    )  # fmt: skip


def time_ort(
    report: Report, runtime: Runtime, case: str, form: Form, model: bytes, feeds: dict[int, dict[str, torch.Tensor]]
) -> None:
    """Time one model at every row count, plain and with CUDA graphs (one graph id per row count)."""
    for graph in (False, True):
        with report.part(f"{case} {form.name} graph={graph}: session"):
            session = runtime.session(model, graph=graph, strict=True)
            for index, (rows, inputs) in enumerate(feeds.items()):
                with report.part(f"{case} {form.name} graph={graph} M={rows}"):
                    run = runtime.runner(session, inputs, index + 1 if graph else None)
                    report.timings.append(measure(case, rows, form.name, graph, run))
            del session


def time_torch(report: Report, case: str, how: str, rows: int, run: Callable[[], object], plain: bool = True) -> None:
    """Time a torch function plain (if asked) and in a CUDA graph."""
    if plain:
        with report.part(f"{case} {how} M={rows}"):
            report.timings.append(measure(case, rows, how, False, run))
    with report.part(f"{case} {how} graph M={rows}"):
        report.timings.append(measure(case, rows, how, True, captured(run)))


def time_chain(report: Report, runtime: Runtime | None, sizes: Sizes) -> None:
    """Part (a): eight chained matmuls."""
    layers = make_chain(sizes, "cuda")
    feeds = {m: {"x": torch.randn((1, m, sizes.narrow), device="cuda").half()} for m in CHAIN_ROWS}
    for form in CHAIN_FORMS:
        if runtime is None:
            break  # its failure is recorded; torch is measured all the same
        with report.part(f"chain {form.name}"):
            time_ort(report, runtime, "chain", form, forms.chain(layers, form)[0], feeds)
    weights = [torch.from_numpy(layer.weight).cuda() for layer in layers]
    for m, inputs in feeds.items():
        time_torch(report, "chain", "torch fp16", m, fp16_chain(weights, inputs["x"][0]))
        for fast in (False, True):
            name = "torch _scaled_mm, GEMMs alone" + (", fast accumulation" if fast else "")
            with report.part(f"chain {name} M={m}"):
                time_torch(report, "chain", name, m, scaled_mm(weights, m, fast), plain=False)


def time_block(report: Report, runtime: Runtime | None, sizes: Sizes) -> None:
    """Part (b): a DiT block without the attention itself."""
    layers, norm_scales = make_block(sizes, "cuda")
    feeds = {m: block_inputs(sizes, m // BLOCK_TOKENS, BLOCK_TOKENS, "cuda") for m in BLOCK_ROWS}
    for form in BLOCK_FORMS:
        if runtime is None:
            break  # its failure is recorded; torch is measured all the same
        with report.part(f"block {form.name}"):
            fed = feeds if form.kind == "fused" else {m: plus_one(inputs) for m, inputs in feeds.items()}
            time_ort(report, runtime, "block", form, forms.block(layers, norm_scales, form)[0], fed)
    weights = [torch.from_numpy(layer.weight).cuda() for layer in layers.values()]
    held = torch_weights(layers, torch.float16, "cuda")
    for m, inputs in feeds.items():
        time_torch(report, "block", "torch fp16 eager", m, lambda inputs=inputs: torch_block(held, inputs))
        with report.part(f"block torch.compile M={m}"):
            compiled = torch.compile(torch_block, dynamic=False)
            time_torch(
                report, "block", "torch.compile fp16", m, lambda inputs=inputs, f=compiled: f(held, inputs), plain=False
            )
        for fast in (False, True):
            name = "torch _scaled_mm, GEMMs alone" + (", fast accumulation" if fast else "")
            with report.part(f"block {name} M={m}"):
                time_torch(report, "block", name, m, scaled_mm(weights, m, fast), plain=False)


def rehearse(report: Report, library: Path) -> None:
    """Build every model small, run the stock ones on the CPU against torch, and see the fp8 ones refused cleanly."""
    sizes = Sizes(narrow=192, wide=768, width=128, mlp=512)
    runtime = Runtime(library, "CPUExecutionProvider")
    layers = make_chain(sizes, "cpu")
    block_layers, norm_scales = make_block(sizes, "cpu")
    inputs = block_inputs(sizes, 2, 8, "cpu")
    for case, chosen in (("chain", CHAIN_FORMS), ("block", BLOCK_FORMS)):
        for form in chosen:
            for probe in (False, True):
                with report.part(f"rehearse {case} {form.name} probe={probe}"):
                    made = (
                        forms.chain(layers, form, probe)
                        if case == "chain"
                        else forms.block(block_layers, norm_scales, form, probe)
                    )
                    if form.kind != "stock":
                        refused(runtime, made[0])
                    elif case == "block":
                        held = torch_weights(block_layers, torch.float32, "cpu")
                        want = torch_block(held, {n: t.float() for n, t in inputs.items()})["y"]
                        got = runtime.values(made[0], plus_one(inputs))["y"]
                        relative = float((got.float() - want).norm() / want.norm())
                        name = "stock against torch fp32, CPU"
                        row = {"model": case, "form": form.name, "name": name, "rows": 16, "rel_same_operands": None}
                        row |= {"rel_unquantised": relative, "limit": FP16_LIMIT, "passes": relative < FP16_LIMIT}
                        report.accuracy.append(row)
                    print(f"rehearsed {case} {form.name} probe={probe}", flush=True)


def refused(runtime: Runtime, model: bytes) -> None:
    """Expect that a session without the CUDA provider is refused with an exception."""
    try:
        runtime.session(model)
    except Exception as error:  # onnxruntime's own exception types
        print(f"  refused without CUDA, as it must be: {str(error)[:140]}")
        return
    raise RuntimeError("a session without the CUDA provider accepted the operators")


def main() -> int:
    """Run the parts; returns 0 when nothing failed and every operator agrees with its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lib", type=Path, default=Path(__file__).with_name("libqexport_fp8.so"))
    parser.add_argument("--out", type=Path, default=Path("cuda_ops"), metavar="STEM")
    parser.add_argument(
        "--parts", nargs="+", choices=("accuracy", "chain", "block"), default=["accuracy", "chain", "block"]
    )
    parser.add_argument("--rehearse", action="store_true", help="build and check the models without a GPU")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log = options.out.with_suffix(".log")
    log.touch()
    os.dup2(os.open(log, os.O_WRONLY | os.O_TRUNC), sys.stderr.fileno())  # also what the library prints
    os.environ["QEXPORT_FP8_VERBOSE"] = "1"
    report, library = Report(), options.lib.resolve()
    report.environment = environment(library)
    if options.rehearse:
        rehearse(report, library)
    else:
        runtime = None
        with report.part("onnxruntime"):
            runtime = Runtime(library, "CUDAExecutionProvider")
        if "accuracy" in options.parts and runtime is not None:
            with report.part("accuracy"):
                check_accuracy(report, runtime, Sizes(), "cuda", CHECK_ROWS)
            write(report, options.out, log)
        for name, part in (("chain", time_chain), ("block", time_block)):
            if name in options.parts:
                with report.part(name):
                    part(report, runtime, Sizes())
                write(report, options.out, log)
    write(report, options.out, log)
    wrong = sum(row["passes"] is False for row in report.accuracy)
    rows = f"{len(report.accuracy)} accuracy rows ({wrong} wrong)"
    print(f"{len(report.timings)} timings, {rows}, {len(report.errors)} errors")
    return 1 if wrong or report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
