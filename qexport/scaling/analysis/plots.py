"""Figures of the analysis, in the style of the other plots."""

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

Lines = Mapping[str, Sequence[float]]


def middle_figure(found: Mapping[str, Any], step: str) -> Figure:
    """`MiddleErrors.to_json` of one width: forced and free, one line a block, the prediction and the state dashed."""
    figure, panels = _figure(2)
    for axes, way, title in zip(panels, ("forced", "free"), ("same inputs", "each by itself"), strict=True):
        rows = found[way]
        depth = len(rows[0])
        lines = {f"after block {i + 1}": [row[i] for row in rows] for i in range(depth)}
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
        kl = [row["kl"] for row in one["by_error"]]
        for name, (style, _) in flipping.items():
            left.plot(kl, [row[name] for row in one["by_error"]], style, color=colour, linewidth=1.5)
        for name, (style, _) in handing.items():
            rows = _positive([row[name] for row in one["per_call"]])
            right.plot(range(1, len(rows) + 1), rows, style, color=colour, linewidth=1.5)
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
            steps = range(1, len(one[name]) + 1)
            axes.plot(steps, one[name], color=colour, linewidth=width, label=_WAYS[way], zorder=10 - width)
    _logarithmic(left)
    for axes, label in ((left, "clean latents, relative L2"), (right, "share of codes that differ")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
    right.set_ylim(0, 1)
    left.set_title(title, color=INK, fontsize=9)
    _legend(right)
    return figure


def kinds_figure(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Cost of a million weights for each kind of layer: {model: rows of `Kind.to_json`}, one panel a model."""
    figure, panels = _figure(len(found))
    for axes, (model, rows) in zip(panels, found.items(), strict=True):
        formats = list(dict.fromkeys(row["format"] for row in rows))
        at = {(row["kind"], row["format"]): max(row["cost_per_million"], _LEAST) for row in rows}
        kinds = sorted({row["kind"] for row in rows}, key=lambda kind: at[kind, formats[0]])
        for name, colour in zip(formats, COLOURS, strict=False):
            axes.plot([at[kind, name] for kind in kinds], range(len(kinds)), "o", color=colour, label=name)
        axes.set_yticks(range(len(kinds)), [kind.removeprefix("blocks.*.") for kind in kinds], color=INK)
        axes.set_xscale("log")
        axes.grid(axis="both", color=GRID, linewidth=0.8)
        axes.set_title(model, color=INK, fontsize=9)
        axes.set_xlabel("cost of a million weights")
    _legend(panels[-1])
    return figure


_WAYS = {"none": "continuous", "end": "codes at the end", "each": "codes at every step"}
_WAY_LOOKS = {"none": (COLOURS[0], 1.5), "end": ("#93c5fd", 4.0), "each": (COLOURS[2], 1.5)}
"""Colour and width of each way's line."""


def save(figure: Figure, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png, the same bytes from the same figures."""
    with rc_context({**STYLE, "svg.hashsalt": "qexport"}):
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(stem.with_suffix(".png"), dpi=_DPI, metadata={"Software": None})


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(_PANEL_INCHES[0] * panels + 1.0, _PANEL_INCHES[1]), layout="constrained")
        found = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
        for axes in found:
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
    return figure, found


def _lines(
    axes: Axes, lines: Lines, x: str, y: str, colour: str | None = None, style: str = "-", log: bool = True
) -> None:
    for number, (name, values) in enumerate(lines.items()):
        shown = _positive(values) if log else list(values)
        own = colour or COLOURS[number % len(COLOURS)]
        marker = "o" if len(shown) < 12 else None
        axes.plot(
            range(1, len(shown) + 1), shown, style, marker=marker, markersize=3, linewidth=1.5, color=own, label=name
        )
    if log:
        _logarithmic(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _same_range(panels: Sequence[Axes]) -> None:
    low, high = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(low), max(high))


def _positive(values: Sequence[float]) -> list[float]:
    """Zeros have no place on a logarithmic axis: they are left out."""
    return [value if value > 0 else math.nan for value in values]


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(handles=handles, frameon=False, fontsize=7.5, labelcolor=INK, **place)
