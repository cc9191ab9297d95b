"""``verify.html``: the whole report in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from qexport.family import random_seed
from qexport.verify.decision_html import decision_html
from qexport.verify.html import number, section, table
from qexport.verify.limits import FP32_LOGITS_RELATIVE_L2
from qexport.verify.plots import COLOURS, bar_plot, error_plot, png_data
from qexport.verify.report import VerifyReport

_MB = 10**6


def render(report: VerifyReport) -> str:
    """The HTML text of a report."""
    data = report.to_json()
    style = files("qexport.verify").joinpath("report.css").read_text(encoding="utf-8")
    parts = [_head(data), _tiles(data), _checks(data), _pictures(report), _plots(data), decision_html(report),
             _layers(data), _placement(data), _speed(data), _footer(data)]  # fmt: skip
    title = f"{escape(data['model'] or data['bundle'])} {escape(data['scheme'])}: verify"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(data: Mapping[str, Any]) -> str:
    verdict = "passed" if data["passed"] else "failed"
    failures = [check for check in data["checks"] if not check["passed"]]
    line = (
        f"{len(data['checks'])} checks passed"
        if not failures
        else f"{len(failures)} of {len(data['checks'])} checks failed"
    )
    random = random_seed(data["source"]) is not None
    banner = f'<div class="note warning"><b>{escape(data["source"])}</b></div>' if random else ""
    return banner + (
        f'<header><div><p class="kicker">qexport verify</p><h1>{escape(data["model"])} '
        f'<span>{escape(data["scheme"])}</span></h1><p class="path">{escape(data["bundle"])} · '
        f"digest {escape(data['digest'][:16])}</p></div>"
        f'<div class="badge {verdict}"><b>{verdict}</b><small>{line}</small></div></header>'
    )


def _tiles(data: Mapping[str, Any]) -> str:
    quality, totals, draws = data["quality"], data["totals"], data["trajectories"].get("draws")
    tiles = [("bits per quantised weight", number(data["bits_per_weight"]), "scales included")]
    if data["size_bytes"]:
        all_of_it, quantised = totals.get("share_of_fp16_all"), totals.get("share_of_fp16_quantized")
        note = f"weights {all_of_it:.0%} of fp16" if all_of_it else ""
        note += f", quantised ones {quantised:.0%}" if quantised else ""
        tiles.append(("bundle", f"{data['size_bytes'] / _MB:.2f} MB", note))
    if "kl" in quality:
        tiles.append(("KL(fp‖quantised)", number(quality["kl"]), f"nats per token, {quality['n']} samples"))
        tiles.append(
            ("top-1 agreement", f"{quality['top1_agreement']:.1%}", f"top-900 {quality['top900_agreement']:.1%}")
        )
    if "output_mse" in quality:
        note = f"relative to the output's power, {quality['n_output']} noisy latents"
        tiles.append(("output error", number(quality["output_mse"]), note))
        note = f"relative L2 of final latents, {quality['n']} trajectories"
        tiles.append(("trajectory error", number(quality["trajectory_error"]), note))
    if "fd" in quality:
        fd = quality["fd"]
        tiles.append(
            (
                fd["label"],
                number(fd["value"]),
                f"95 %: {fd['ci95'][0]:.2f} … {fd['ci95'][1]:.2f}, {fd['n']} images",
            )
        )
    if draws:
        tiles.append(
            ("identical draws", f"{draws['identical']:,}", f"of {draws['total']:,}; {draws['excused']} excused")
        )
    cells = "".join(f"<div><small>{escape(a)}</small><b>{escape(b)}</b><i>{escape(c)}</i></div>" for a, b, c in tiles)
    return f'<section class="tiles">{cells}</section>'


def _checks(data: Mapping[str, Any]) -> str:
    rows = [
        (
            f'<span class="mark {"yes" if c["passed"] else "no"}">{"✓" if c["passed"] else "✗"}</span>',
            escape(c["name"]),
            f"<span class=n>{number(c['value'])}</span>",
            f"<span class=n>≤ {number(c['limit'])}</span>",
            escape(c["unit"]),
            f"<code>{escape(c['where'])}</code>" if c["where"] else "",
            escape(c["detail"]),
        )
        for c in data["checks"]
    ]
    html = table(("", "check", "value", "limit", "unit", "where", ""), rows, "checks")
    if data["notes"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in data["notes"])
        html += f'<div class="note"><b>Noted while it was made</b><ul>{items}</ul></div>'
    if data["skipped"]:
        items = "".join(f"<li><b>{escape(s['name'])}</b>: {escape(s['reason'])}</li>" for s in data["skipped"])
        html += f'<div class="note"><b>Skipped</b><ul>{items}</ul></div>'
    return section("Checks", html, "Parity under exact session options, against the quantised torch model.")


def _pictures(report: VerifyReport) -> str:
    if not report.pictures:
        return ""
    rows = []
    for title, images in report.pictures.items():
        cells = "".join(f'<img alt="" src="{png_data(image)}">' for image in images)
        rows.append(f"<div><small>{escape(title)}</small><p>{cells}</p></div>")
    seed, schedule = report.settings.get("seed"), report.settings.get("schedule")
    by = f", schedule {schedule}" if schedule else ""
    return section(
        "The same seeds on every side", f'<div class="pictures">{"".join(rows)}</div>',
        f"Seed {seed}{by}, one class after another. The second and the third row must be the same.",
    )  # fmt: skip


def _plots(data: Mapping[str, Any]) -> str:
    plots = []
    by_graph: dict[str, dict[str, Sequence[float]]] = {}
    for name, values in data["error_per_call"].items():
        graph, _, group = name.partition("/")
        by_graph.setdefault(graph, {})[group] = [1.0 if v is None else v for v in values]
    for graph, series in by_graph.items():
        if any(len(values) > 1 for values in series.values()):
            plots.append((f"ONNX Runtime against torch: {graph}", error_plot(series, FP32_LOGITS_RELATIVE_L2)))
    scales = data["quality"].get("per_scale", {})
    if scales:
        plots.append(("KL(fp‖quantised) by scale, nats", bar_plot(scales["kl"], "KL, nats", COLOURS[0])))
        for place, name in enumerate(("top1_agreement", "top900_agreement"), start=1):
            title = f"{name.removesuffix('_agreement').capitalize()} agreement by scale"
            plots.append((title, bar_plot(scales[name], "share", COLOURS[place], 1.08)))
    quality = data["quality"]
    if "per_step" in quality:
        series = {"latents": quality["per_step"]}
        plots.append(("Quantised against full precision: latents after each step", error_plot(series, None)))
        bars = bar_plot(quality["per_range"], "relative squared error", x="quarter of the timesteps, least noisy first")
        plots.append(("Output error by timestep", bars))
    if not plots:
        return ""
    figures = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in plots)
    return section(
        "Error and quality, step by step", f'<div class="plots">{figures}</div>', data["quality"].get("source", "")
    )


def _layers(data: Mapping[str, Any]) -> str:
    rows = [
        (
            f"<code>{escape(str(r['name']))}</code>",
            "×".join(str(n) for n in r["shape"]),
            escape(str(r["format"])),
            escape(str(r.get("granularity") or "–")),
            f"<span class=n>{number(r['bits_stored'])}</span>",
            f"<span class=n>{r['size_bytes']:,}</span>",
            f"<span class=n>{number(r['sqnr_db'])}</span>",
            escape(str(r.get("fused_form") or "–")),
        )
        for r in data["layers"]
    ]
    heads = ("layer", "shape", "format", "granularity", "bits", "bytes", "SQNR, dB", "form under serve")
    return section("Layers", table(heads, rows, "layers")) if rows else ""


def _placement(data: Mapping[str, Any]) -> str:
    placement, rows = data["placement"], []
    for options in ("exact", "serve"):
        for graph, found in placement.get(options, {}).items():
            ran = ", ".join(
                f"{count} on {name.removesuffix('ExecutionProvider')}" for name, count in found["nodes"].items()
            )
            forms = ", ".join(f"{count} × {form}" for form, count in found["forms"].items()) or "–"
            rows.append((options, escape(graph), escape(ran), escape(forms)))
    if not rows:
        return ""
    note = placement.get("cuda", "")
    return section(
        "Placement", table(("options", "graph", "nodes", "quantised layers"), rows), note[:1].upper() + note[1:]
    )


def _speed(data: Mapping[str, Any]) -> str:
    latency = data["latency_ms"]
    rows = [
        (
            name.removeprefix("batch_"),
            escape(graph),
            *(f"<span class=n>{v[key]:.2f}</span>" for key in ("median", "min", "max")),
            f"<span class=n>{v['runs']}</span>",
        )
        for name, graphs in latency.items()
        if name.startswith("batch_")
        for graph, v in graphs.items()
    ]
    if not rows:
        return ""
    peak = data["peak_memory_bytes"]
    note = f"After {latency['warm_up']} run to warm up, {latency['provider']}, under serve."
    if latency.get("schedule"):
        note += f" Schedule {latency['schedule']}."
    if peak:
        note += f" Peak memory of the whole verification, torch included: {peak / _MB:,.0f} MB."
    return section("Speed, milliseconds a batch", table(("batch", "graph", "median", "min", "max", "runs"), rows), note)


def _footer(data: Mapping[str, Any]) -> str:
    environment = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    processor = f"{environment.get('cpu', '')} × {environment.get('cpu_count', '')}"
    text = f"{processor} · Python {environment.get('python', '')} · {versions}"
    return f"<footer>{escape(text)}<br>{escape(environment.get('platform', ''))}</footer>"
