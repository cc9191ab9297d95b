"""`qexport inspect`: what a bundle or an .onnx file holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.errors import InputError
from qexport_cli.options import JsonOption
from qexport_cli.render import (
    Column,
    figure,
    number,
    print_facts,
    print_json,
    print_line,
    print_table,
    shape,
    size,
    warning,
)

if TYPE_CHECKING:
    from qexport.inspect import BundleReport, LayerRow
    from qexport.inspect.onnx_file import OnnxReport

SHOWN = 10
"""Longest list of operators or ports; `--json` has all of them."""

LAYER_COLUMNS = (
    Column("layer", shorten=True),
    Column("shape"),
    Column("format"),
    Column("group", right=True),
    Column("bits", right=True),
    Column("size", right=True),
    Column("SQNR dB", right=True),
    Column("on CPU", wide_only=True),
    Column("on CUDA", wide_only=True),
)


def inspect(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE|FILE.onnx", help="A bundle's folder, or any ONNX model.")],
    json: JsonOption = False,
) -> None:
    """Show the layers, formats, bits and operators of a file.

    PATH is a bundle, or any .onnx file. Nothing is run; kernels are what ONNX Runtime's rules lead one to expect.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a bundle or an .onnx file")
    if path.is_dir() or path.name == "manifest.json":
        from qexport.inspect import inspect_bundle

        report = inspect_bundle(path)
        print_json(report.to_json()) if json else _show_bundle(report)
        return
    from qexport.inspect.onnx_file import inspect_onnx

    report = inspect_onnx(path)
    print_json(report.to_json()) if json else _show_onnx(report)


def _show_bundle(report: BundleReport) -> None:
    manifest = report.bundle.manifest
    _show_layers(report.layers)
    facts: dict[str, object] = {
        "model": f"{manifest.model.name} ({manifest.model.family}), {manifest.model.image_size} pixels, "
        f"{manifest.model.num_classes} classes, {manifest.model.licence}",
        **(warning(manifest.model.source) or {"weights": manifest.model.source}),
        "scheme": f"{manifest.scheme}, computes in {manifest.dtype}",
        **_totals(manifest.totals),
        "bundle": f"{report.bundle.path} ({size(report.size_bytes)}, {len(manifest.files) + 1} files)",
        **_fusion(report.layers),
    }
    for graph in report.graphs:
        opset = f", opset {graph.opsets.get('ai.onnx', '?')}" if graph.opsets is not None else ""
        operators = _operators(graph.operators) if graph.operators is not None else "install onnx to list its operators"
        facts[f"graph {graph.name}"] = f"{graph.file} ({size(graph.size_bytes)}{opset}): {operators}"
    if manifest.targets:
        facts["lowered to"] = ", ".join(sorted(manifest.targets))
    facts["inputs"] = ", ".join(
        spec.name if spec.default is None else f"{spec.name}={spec.default:g}" for spec in manifest.plan.inputs
    )
    if manifest.plan.schedules:
        facts["schedule"] = f"{manifest.plan.schedule}; there are {', '.join(manifest.plan.schedules)}"
    print_line()
    print_facts(facts)


def _show_onnx(report: OnnxReport) -> None:
    _show_layers(report.layers)
    facts = {
        "file": f"{report.path} ({size(report.path.stat().st_size)})",
        "made by": report.producer or None,
        "opset": ", ".join(f"{domain} {version}" for domain, version in report.opsets.items())
        + f"; IR {report.ir_version}",
        **_totals(report.totals),
        **_fusion(report.layers),
        "operators": _operators(report.operators),
        "constants": "; ".join(
            f"{dtype}: {count} of {number(elements)} elements, {size(nbytes)}"
            for dtype, (count, elements, nbytes) in report.dtypes.items()
        ),
    }
    for file in report.external:
        state = "missing" if file.size_bytes is None else size(file.size_bytes)
        if file.size_bytes is not None and file.size_bytes < file.needed_bytes:
            state = f"truncated: {file.size_bytes} bytes of {file.needed_bytes}"
        facts["external data"] = ", ".join(filter(None, (facts.get("external data"), f"{file.location} ({state})")))
    for name, ports in (("inputs", report.inputs), ("outputs", report.outputs)):
        facts[name] = _few([f"{port} [{', '.join(map(str, sizes))}]" for port, sizes in ports.items()], "more")
    print_line()
    print_facts(facts)


def _show_layers(layers: Iterable[LayerRow]) -> None:
    rows = [
        (
            layer.name,
            shape(layer.shape),
            layer.format,
            layer.group_size or (layer.granularity or "").removeprefix("per ") or None,
            figure(layer.bits_per_weight),
            size(layer.size_bytes),
            None if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            _kernel(layer, "cpu"),
            _kernel(layer, "cuda"),
        )
        for layer in layers
    ]
    if rows:
        print_table(LAYER_COLUMNS, rows)
    else:
        print_line("no matrices")


def _kernel(layer: LayerRow, provider: str) -> str | None:
    fusion = layer.fused.get(provider)
    return None if fusion is None else fusion.kernel or "not fused"


def _fusion(layers: Iterable[LayerRow]) -> dict[str, str]:
    """How many layers are expected to fuse, and why others are not; never measured, so it says expected."""
    counts: dict[str, Counter[str]] = {}
    for layer in layers:
        for provider, fusion in layer.fused.items():
            what = f"{fusion.kernel} expected" if fusion.kernel else f"not fused ({fusion.reason})"
            counts.setdefault(provider, Counter())[what] += 1
    return {
        f"on {provider.upper()}": ", ".join(f"{count} × {what}" for what, count in found.most_common())
        for provider, found in counts.items()
    }


def _totals(totals: Mapping[str, float]) -> dict[str, str]:
    facts = {}
    for title, key in (("quantised", "quantized"), ("everything", "all")):
        if not totals.get(f"weights_{key}"):
            continue
        facts[title] = (
            f"{number(totals[f'weights_{key}'])} weights × {figure(totals[f'bits_per_weight_{key}'])} bits = "
            f"{size(totals[f'size_bytes_{key}'])}, {totals[f'share_of_fp16_{key}']:.3f} of fp16"
        )
    return facts


def _operators(counts: Mapping[str, int]) -> str:
    return _few([f"{name}×{count}" for name, count in counts.items()], "more kinds")


def _few(items: list[str], rest: str) -> str:
    """The first of many, and how many more there are."""
    more = [f"{len(items) - SHOWN} {rest}"] if len(items) > SHOWN else []
    return ", ".join(items[:SHOWN] + more)
