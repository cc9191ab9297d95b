"""What `qexport quantize` says when it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qexport_cli.render import (
    Column,
    figure,
    number,
    print_facts,
    print_line,
    print_table,
    seconds,
    size,
    warning,
)
from qexport_cli.resources import peak_memory_bytes

if TYPE_CHECKING:
    from qexport.bundle import Bundle

SENSITIVE_SHOWN = 8
_MERITS = {"kl": "KL, nats", "output_mse": "output error"}


def figures_of(bundle: Bundle, spent_s: float) -> dict[str, Any]:
    """Plain data for `--json`; `seconds` is the wall time of the whole command."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "model": manifest.model.name,
        "source": manifest.model.source,
        "licence": manifest.model.licence,
        "scheme": manifest.scheme,
        "digest": manifest.digest,
        **manifest.totals,
        "size_bytes": sum(entry.size for entry in manifest.files.values()),
        "seconds": round(spent_s, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        **({"notes": [note["text"] for note in manifest.notes]} if manifest.notes else {}),
        **_reports(bundle),
    }


def _reports(bundle: Bundle) -> dict[str, Any]:
    """What was measured while choosing, where anything was."""
    from qexport.bundle.reports import COMPARE_REPORT, SENSITIVITY_REPORT, TRAINING_REPORT

    found: dict[str, Any] = {}
    for key, name in (("compare", COMPARE_REPORT), ("sensitivity", SENSITIVITY_REPORT), ("training", TRAINING_REPORT)):
        file = bundle.reports / name
        if file.is_file():
            found[key] = json.loads(file.read_text(encoding="utf-8"))
    found.get("training", {}).pop("losses", None)  # one for each step; they are in the report
    return found


def show(bundle: Bundle, figures: Mapping[str, Any]) -> None:
    """Tables and what to do next."""
    if "compare" in figures:
        _show_compared(figures["compare"])
    if "sensitivity" in figures:
        _show_sensitivity(figures["sensitivity"])
    rows = [
        [
            name,
            number(figures.get(f"weights_{key}")),
            figure(figures.get(f"bits_per_weight_{key}")),
            size(figures.get(f"size_bytes_{key}")),
            _times_smaller(figures.get(f"share_of_fp16_{key}")),
        ]
        for name, key in (("quantised matrices", "quantized"), ("everything", "all"))
        if figures.get(f"weights_{key}")
    ]
    columns = (
        Column("weights of"),
        Column("count", right=True),
        Column("bits/weight", right=True),
        Column("size", right=True),
        Column("against fp16", right=True),
    )
    print_table(columns, rows, f"{figures['model']} as {figures['scheme']}")
    print_line()
    memory = size(figures["peak_memory_bytes"])
    print_facts(
        {
            **warning(figures["source"]),
            "layers": f"{figures.get('layers_quantized', 0)} of {figures.get('layers', '?')} quantised",
            **_trained(figures.get("training")),
            "took": seconds(figures["seconds"]) + (f", peak memory {memory}" if memory else ""),
            "bundle": f"{bundle.path} ({size(figures['size_bytes'])})",
        }
    )
    print_line()
    print_line("next:")
    print_line(f"  qexport verify {bundle.path}")
    print_line(f"  qexport generate {bundle.path}")


def _trained(report: Mapping[str, Any] | None) -> dict[str, str]:
    """Figures on the held-out samples before and after fine-tuning, and what it was."""
    if report is None:
        return {}
    merit = _MERITS[str(report["figure"])]
    loss = report["loss"] + (f", K {report['top_k']}" if "top_k" in report else "")
    settings = report["settings"]
    held, steps = settings["held_out"], f"{report['steps']} steps of {settings['batch']}"
    if report["steps"] < settings["steps"]:
        steps += f" (stopped early, of {settings['steps']})"
    if settings["ema"]:
        steps += f", mean of decay {settings['ema']:g}"
    since = f" since step {report['resumed_after']}" if report["resumed_after"] else ""
    kept = "" if report["best_step"] else "; no better, so the start is kept"
    return {
        "fine-tuned": f"{merit} {figure(report['start'])} → {figure(report['best'])} on {held} held-out samples{kept}",
        "by": f"{loss}, {steps}, from {report['start_from']}, in {seconds(report['wall_s'])}{since}",
        "on": report["data"],
    }


def _show_compared(report: Mapping[str, Any]) -> None:
    merit = str(report["merit"])
    rows = [
        [
            row["method"] + (" ←" if row["method"] == report["chosen"] else ""),
            figure(row[merit]),
            figure(row.get("top1_agreement")),
            figure(row["bits_per_weight"]),
            figure(row["sqnr_db"], 3),
            seconds(row["seconds"]),
        ]
        for row in report["rows"]
    ]
    columns = (
        Column("method"),
        Column(_MERITS[merit], right=True),
        Column("top-1", right=True),
        Column("bits/weight", right=True),
        Column("SQNR, dB", right=True),
        Column("took", right=True),
    )
    print_table(columns, rows, f"{report['model']} as {report['scheme']}: methods compared")
    source = report["rows"][0].get("source")
    print_line(f"on {source}; ← is what the bundle holds" if source else "← is what the bundle holds")
    print_line()


def _show_sensitivity(report: Mapping[str, Any]) -> None:
    merit = str(report["merit"])
    chosen: Mapping[str, str] = report["chosen"]
    costs: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        costs.setdefault(row["layer"], {})[f"{row['format']} {row['granularity']}"] = row["cost"]
    shown = ("int2 per group of 32", "int4 per group of 32", "int8 per channel")
    order = sorted(costs, key=lambda layer: -costs[layer].get(shown[1], 0.0))
    rows: list[Sequence[object]] = [
        [layer, *(figure(costs[layer].get(name), 3) for name in shown), chosen[layer]]
        for layer in order[:SENSITIVE_SHOWN]
    ]
    columns = (
        Column("layer", shorten=True),
        Column("int2", right=True),
        Column("int4", right=True),
        Column("int8", right=True),
        Column("chosen"),
    )
    title = f"{report['model']}: {_MERITS[merit]} with one layer alone quantised"
    print_table(columns, rows, title)
    rest = len(order) - len(rows)
    print_line(f"the {len(rows)} most sensitive; {rest} more in reports/sensitivity.json and .svg" if rest > 0 else "")
    print_line()


def _times_smaller(share: float | None) -> str | None:
    return f"{1 / share:.2f}× smaller" if share else None
