"""``index.html``: the whole sweep in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from qexport.scaling.figures import FD
from qexport.scaling.findings import Finding
from qexport.scaling.report import cell, command_of, how_measured
from qexport.scaling.select import Selection

_FIGURES = {
    "kl": "KL", "top1_agreement": "top-1", "cross_entropy": "cross-entropy", "output_mse": "output error",
    "loss": "loss", "trajectory_error": "trajectory error", FD: "FD",
}  # fmt: skip


def render(selection: Selection, found: Sequence[Finding], plots: Mapping[str, str]) -> str:
    """The HTML text; `plots` maps a title to SVG text."""
    style = files("qexport.verify").joinpath("report.css").read_text(encoding="utf-8")
    series = ", ".join(selection.series)
    parts = [
        _head(selection, series),
        _findings(found),
        _plots(plots),
        *(_runs(selection, s) for s in selection.series),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(series)}: bit-level scaling</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}{_STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


_STYLE = """
.finding { margin: 3px 0; } .finding.open { color: var(--muted); }
h3 { font-size: 14px; margin: 16px 0 4px; } pre { white-space: pre-wrap; margin: 0; font-size: 12px; }
"""


def _head(selection: Selection, series: str) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in how_measured(selection))
    return (
        '<header><div><p class="kicker">qexport scaling</p><h1>Which size at how many bits '
        f"<span>{escape(series)}</span></h1></div></header>"
        f"<section><h2>How it was measured</h2><pre><code>{escape(command_of(selection))}</code></pre>"
        f"<ul>{items}</ul></section>"
    )


def _findings(found: Sequence[Finding]) -> str:
    topics: dict[str, list[Finding]] = {}
    for item in found:
        topics.setdefault(item.topic, []).append(item)
    blocks = []
    for topic, items in topics.items():
        lines = "".join(f'<li class="finding{"" if i.shown else " open"}">{escape(i.text)}</li>' for i in items)
        blocks.append(f"<h3>{escape(topic)}</h3><ul>{lines}</ul>")
    return (
        '<section><h2>Findings</h2><p class="sub">Grey: the interval does not decide.</p>'
        + "".join(blocks)
        + "</section>"
    )


def _plots(plots: Mapping[str, str]) -> str:
    figures = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in plots.items())
    note = (
        "Lower is better. Bars are 95 % intervals, those of losses without what all runs share by being judged on the "
        "same images; dashes are floating-point formats."
    )
    return f'<section><h2>Plots</h2><p class="sub">{note}</p><div class="plots">{figures}</div></section>'


def _runs(selection: Selection, series: str) -> str:
    rows = [row for run, row in selection.rows.items() if run.series == series]
    rows.sort(key=lambda r: (r.measured.cost["parameters"], -r.run.bits, str(r.run)))
    names = [name for name in _FIGURES if any(name in row.measured.figures for row in rows)]
    heads = ("model", "format", "method", "bits", "MB", *(_FIGURES[name] for name in names))
    cells = [
        (
            escape(row.run.model), escape(row.run.number_format), escape(row.run.method),
            f"<span class=n>{row.measured.cost['information_bits_per_weight']:.2f}</span>",
            f"<span class=n>{row.measured.cost['total_bits'] / 8e6:.2f}</span>",
            *(f"<span class=n>{escape(cell(row.measured.figures.get(name)))}</span>" for name in names),
        )
        for row in rows
    ]  # fmt: skip
    return f"<section><h2>{escape(series)}</h2>{_table(heads, cells)}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
