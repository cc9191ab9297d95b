"""Figures of the analysis, in the style of the other plots; bands and bars are 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from qexport.verify.plots import COLOURS, GRID, INK, MUTED, STYLE

_PANEL_INCHES = (4.2, 3.0)
_DPI = 150
_LEAST = 1e-9
"""Costs that are zero are drawn here: their axis is logarithmic."""

_CUT = 0.1
"""Where the band of an interval that reaches zero ends on a logarithmic axis, as a share of the value."""

_BAND = 0.18
"""Opacity of an interval around a line."""

Estimated = Mapping[str, Any]
"""`Resampled.to_json`: ``value`` and ``ci95``."""

Lines = Mapping[str, Estimated]


def middle_figure(found: Mapping[str, Any], step: str) -> Figure:
    """`MiddleErrors.to_json` of one width: forced and free, one line a block, the prediction and the state dashed."""
    figure, panels = _figure(2)
    for axes, way, title in zip(panels, ("forced", "free"), ("same inputs", "each by itself"), strict=True):
        depth = len(found[way]["value"][0])
        lines = {f"after block {i + 1}": _column(found[way], i) for i in range(depth)}
        _lines(axes, lines, step, "relative L2")
        _lines(axes, {"prediction": found[f"{way}_output"]}, step, "relative L2", INK, "--")
        _lines(axes, {"state": found[f"{way}_state"]}, step, "relative L2", MUTED, ":")
        axes.set_title(title, color=INK, fontsize=9)
    _same_range(panels)
    _legend(panels[-1])
    return figure


def widths_figure(found: Mapping[str, Mapping[str, Any]], step: str) -> Figure:
    """The state of free play at several widths: {"4": `MiddleErrors.to_json`, …}."""
    figure, (left, right) = _figure(2)
    _lines(left, {f"W{bits}": one["forced_output"] for bits, one in found.items()}, step, "prediction, relative L2")
    _lines(right, {f"W{bits}": one["free_state"] for bits, one in found.items()}, step, "state, relative L2")
    left.set_title("same inputs", color=INK, fontsize=9)
    right.set_title("each by itself", color=INK, fontsize=9)
    _legend(right)
    return figure


def flips_figure(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Flips against the divergence that caused them, and what is handed on, drawn or as an expectation, per scale."""
    figure, (left, right) = _figure(2)
    flipping: dict[str, tuple[Any, str]] = {
        "flip": ("-", "inverse CDF"),
        "race_flip": ("--", "race"),
        "tv": (":", "least possible"),
    }
    handing: dict[str, tuple[Any, str]] = {"race_hard": ("-", "drawn (race)"), "soft": (":", "expected code")}
    for one, colour in zip(found.values(), COLOURS, strict=False):
        kl = [row["kl"]["value"] for row in one["by_error"]]
        for name, (style, _) in flipping.items():
            _line(left, kl, _rows(one["by_error"], name), style, color=colour)
        for name, (style, _) in handing.items():
            rows = _positive(_rows(one["per_call"], name))
            _line(right, range(1, len(rows["value"]) + 1), rows, style, color=colour)
    left.set_xscale("log")
    left.set_xlabel("KL before the draw, nats")
    left.set_ylabel("share of tokens that flip")
    left.set_ylim(0, 1)
    _logarithmic(right)
    right.set_xlabel("scale")
    right.set_ylabel("squared error of the code")
    widths = [Line2D([], [], color=c, label=f"W{bits}") for bits, c in zip(found, COLOURS, strict=False)]
    for axes, kinds in ((left, flipping), (right, handing)):
        styles = [Line2D([], [], color=INK, linestyle=style, label=label) for style, label in kinds.values()]
        _legend(axes, [*styles, *widths])
    return figure


def control_figure(found: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Clean latents handed on at each step, and codes that differ, one line a way."""
    figure, (left, right) = _figure(2)
    for one in found:  # codes at the end are those of the continuous way but for the last step: drawn wide, below it
        way, (colour, width) = one["way"], _WAY_LOOKS[one["way"]]
        for axes, name in ((left, "error"), (right, "flip")):
            steps = range(1, len(one[name]["value"]) + 1)
            shown = _positive(one[name]) if name == "error" else one[name]
            _line(axes, steps, shown, "-", color=colour, linewidth=width, label=_WAYS[way], zorder=10 - width)
    _logarithmic(left)
    for axes, label in ((left, "clean latents, relative L2"), (right, "share of codes that differ")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    right.set_ylim(0, 1)
    left.set_title(title, color=INK, fontsize=9)
    _legend(right)
    return figure


def kinds_figure(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Cost of a million weights for each kind of layer: {model: rows of `Kind.to_json`}, two panels a row."""
    columns = min(len(found), 2)
    figure, panels = _figure(columns, -(-len(found) // columns), len(found))
    for axes, (model, rows) in zip(panels, found.items(), strict=True):
        formats = list(dict.fromkeys(row["format"] for row in rows))
        at = {(row["kind"], row["format"]): row["cost_per_million"] for row in rows}
        kinds = sorted({row["kind"] for row in rows}, key=lambda kind: at[kind, formats[0]]["value"])
        for name, colour in zip(formats, COLOURS, strict=False):
            values = [max(at[kind, name]["value"], _LEAST) for kind in kinds]
            reach = [_reach(value, at[kind, name]["ci95"]) for value, kind in zip(values, kinds, strict=True)]
            axes.errorbar(
                values, range(len(kinds)), xerr=list(zip(*reach, strict=True)), fmt="o", markersize=4, color=colour,
                linewidth=1.2, capsize=2.5, label=name,
            )  # fmt: skip
        axes.set_yticks(range(len(kinds)), [kind.removeprefix("blocks.*.") for kind in kinds], color=INK)
        axes.set_xscale("log")
        axes.grid(axis="both", color=GRID, linewidth=0.8)
        axes.set_title(model, color=INK, fontsize=9)
        axes.set_xlabel("cost of a million weights")
    _legend(panels[columns - 1])
    return figure


_WAYS = {"none": "continuous", "end": "codes at the end", "each": "codes at every step"}
_WAY_LOOKS = {"none": (COLOURS[0], 1.5), "end": ("#93c5fd", 4.0), "each": (COLOURS[2], 1.5)}
"""Colour and width of each way's line."""


def save(figure: Figure, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png, the same bytes from the same figures."""
    with rc_context({**STYLE, "svg.hashsalt": "qexport"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(stem.with_suffix(".png"), dpi=_DPI, metadata={"Software": None})


def _figure(columns: int, rows: int = 1, panels: int | None = None) -> tuple[Figure, list[Axes]]:
    with rc_context(STYLE):
        size = (_PANEL_INCHES[0] * columns + 1.0, _PANEL_INCHES[1] * rows)
        figure = Figure(figsize=size, layout="constrained")
        found = [figure.add_subplot(rows, columns, i + 1) for i in range(panels or columns * rows)]
        for axes in found:
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
    return figure, found


def _lines(axes: Axes, lines: Lines, x: str, y: str, colour: str | None = None, style: str = "-") -> None:
    for number, (name, found) in enumerate(lines.items()):
        shown = _positive(found)
        marker = "o" if len(shown["value"]) < 12 else None
        own = colour or COLOURS[number % len(COLOURS)]
        steps = range(1, len(shown["value"]) + 1)
        _line(axes, steps, shown, style, marker=marker, markersize=3, color=own, label=name)
    _logarithmic(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _line(axes: Axes, x: Sequence[float], found: Estimated, style: str, **looks: Any) -> None:
    """A line and the band of its interval."""
    axes.plot(x, found["value"], style, **{"linewidth": 1.5, **looks})
    low, high = zip(*found["ci95"], strict=True)
    axes.fill_between(x, low, high, color=looks["color"], alpha=_BAND, linewidth=0, zorder=looks.get("zorder", 2) - 1)


def _column(found: Estimated, index: int) -> Estimated:
    return {name: [row[index] for row in found[name]] for name in ("value", "ci95")}


def _rows(found: Sequence[Mapping[str, Estimated]], figure: str) -> Estimated:
    return {name: [row[figure][name] for row in found] for name in ("value", "ci95")}


def _reach(value: float, ends: Sequence[float]) -> tuple[float, float]:
    """How far an interval reaches below and above; not to where a logarithmic axis has no place."""
    low, high = ends
    return max(value - max(low, _LEAST), 0.0), max(high - value, 0.0)


def _same_range(panels: Sequence[Axes]) -> None:
    low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(low), max(high))


def _positive(found: Estimated) -> Estimated:
    """What fits a logarithmic axis: zeros are left out, bands that reach zero are cut off at `_CUT` of the value."""
    values = [value if value > 0 else math.nan for value in found["value"]]
    bands = [
        (max(low, _CUT * value), math.nan if high is None else high)
        for value, (low, high) in zip(values, found["ci95"], strict=True)
    ]
    return {"value": values, "ci95": bands}


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(handles=handles, frameon=False, fontsize=7.5, labelcolor=INK, **place)
