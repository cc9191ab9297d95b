"""Plots of the law, as SVG text and as PNG at print resolution."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from qexport.scaling.axes import AXES, TOTAL
from qexport.scaling.bars import level_bars, own_bars
from qexport.scaling.curves import Cell, Curve
from qexport.scaling.figures import label_of
from qexport.scaling.grid import FULL, FULL_BITS
from qexport.scaling.law import MERITS, SeriesLaw
from qexport.scaling.levels import Levels
from qexport.verify.plots import COLOURS, GRID, INK, STYLE

PNG_DPI = 300
_WIDTH_INCHES, _HEIGHT_INCHES = 6.4, 4.2
_INCHES_A_BAR = 0.27
_INCHES_APART = 1.0
_LOGARITHMIC_FROM = 5
"""Quotient of largest and smallest from which an axis is logarithmic."""
_FAR = 0.25
"""Curves are apart that begin this share of the others' range above it."""
MOST_NAMED = 8
"""Curves that a legend names one by one."""

_VECTOR_STYLE: dict[Any, Any] = {**STYLE, "svg.hashsalt": "qexport"}
_MARKERS = {"none": "s", "rtn": "o", "gptq": "^", "topkld": "D"}
_OTHER_MARKERS = "vPX*<>"
_COLOUR_OF_BITS = {2: COLOURS[2], 3: COLOURS[4], 4: COLOURS[0], 6: COLOURS[3], 8: COLOURS[1], FULL_BITS: COLOURS[6]}


def plots_of(laws: Mapping[str, SeriesLaw], axis: str = TOTAL) -> dict[str, Figure]:
    """Every plot by its file name without suffix."""
    found: dict[str, Figure] = {}
    for series, law in laws.items():
        for name, curves in law.curves.items():
            found[f"{series}-{name}"] = curve_plot(list(curves.values()), series, name, axis)
    by_figure: dict[str, list[Levels]] = {}
    for law in laws.values():
        for item in law.levels:
            if item.gained.value is not None:
                by_figure.setdefault(item.figure, []).append(item)
    for name, items in by_figure.items():
        found[f"levels-{name}"] = levels_plot(items, name)
    return found


def svg_of(figure: Figure) -> str:
    """The figure as SVG; equal figures give equal bytes."""
    out = io.StringIO()
    with rc_context(_VECTOR_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def png_of(figure: Figure) -> bytes:
    """The figure as PNG."""
    out = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(out, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return out.getvalue()


def curve_plot(curves: Sequence[Curve], series: str, figure: str, axis: str) -> Figure:
    """Quality against bits: a colour for each width, a marker for each method, dashes for floating point.

    Bars are 95 % intervals, of losses without what all runs share (`qexport.scaling.bars`). Curves that lie far above
    all others have a panel of their own over a broken axis. Where a figure is relative to full precision, that curve
    is zero and left out.
    """
    if figure in MERITS:
        curves = [curve for curve in curves if curve.cell.number_format != FULL] or curves
    values = np.concatenate([curve.y for curve in curves])
    logarithmic = bool((values > 0).all() and values.max() > _LOGARITHMIC_FROM * values.min())
    bars = level_bars(curves) if figure in MERITS else own_bars(curves)
    apart = [] if logarithmic else _apart(curves)
    with rc_context(STYLE):
        drawn, panels = _panels(apart, [curve for curve in curves if curve not in apart])
        methods = list(dict.fromkeys(curve.cell.method for curve in curves))
        order = sorted(curves, key=lambda c: (-c.bits, c.cell.number_format, c.cell.method))
        many = len(order) > MOST_NAMED
        for axes, shown in panels:
            for curve in (curve for curve in order if curve in shown):
                axes.errorbar(
                    2**curve.x, curve.y, yerr=bars[curve],
                    color=_COLOUR_OF_BITS.get(curve.bits, INK), marker=_marker(curve.cell, methods),
                    markersize=3.6 if many else 4.5, linewidth=1.0 if many else 1.4, elinewidth=0.8, capsize=1.5,
                    label=str(curve.cell), linestyle=_line(curve.cell),
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"2$^{{{np.log2(value):.3g}}}$"))
            _widen(axes, curves)
            if logarithmic:
                axes.set_yscale("log")
        top, bottom = panels[0][0], panels[-1][0]
        bottom.set_xlabel(AXES[axis].label)
        bottom.set_ylabel(label_of(figure))
        top.set_title(series, loc="left", color=INK, fontsize=10)
        if top is not bottom:
            _break(top, bottom)
        named = [handle for axes, _ in panels for handle in axes.get_legend_handles_labels()[0]]
        bottom.legend(
            handles=_keys(order, methods) if many else named,
            frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK,
        )  # fmt: skip
    return drawn


def _apart(curves: Sequence[Curve]) -> Sequence[Curve]:
    """The few curves that lie far above all others, if there are such."""
    rising = sorted(curves, key=lambda curve: curve.y.min())
    for count in range(1, len(rising) // 4 + 1):
        others = np.concatenate([curve.y for curve in rising[:-count]])
        if rising[-count].y.min() - others.max() > _FAR * np.ptp(others):
            return rising[-count:]
    return []


def _keys(curves: Sequence[Curve], methods: Sequence[str]) -> list[Line2D]:
    """A line for each format and a marker for each method, where naming every curve would fill the page."""
    formats = {curve.cell.number_format: curve for curve in curves}
    lines = [
        Line2D(
            [], [], color=_COLOUR_OF_BITS.get(curve.bits, INK), linewidth=1.4, linestyle=_line(curve.cell), label=name
        )
        for name, curve in formats.items()
    ]
    cells = {curve.cell.method: curve.cell for curve in curves if curve.cell.number_format != FULL}
    markers = [
        Line2D([], [], color=INK, marker=_marker(cell, methods), markersize=4.5, linestyle="", label=name)
        for name, cell in sorted(cells.items())
    ]
    return [*lines, *markers]


def levels_plot(items: Sequence[Levels], figure: str) -> Figure:
    """One bar for each method and width: levels gained, 1 drawn in."""
    with rc_context(STYLE):
        drawn, axes = _figure(1.2 + _INCHES_A_BAR * len(items))
        series = list(dict.fromkeys(item.series for item in items))
        for place, item in enumerate(items):
            gained = item.gained
            assert gained.value is not None
            colour = COLOURS[series.index(item.series) % len(COLOURS)]
            axes.barh(place, gained.value, height=0.62, color=colour, alpha=1.0 if gained.sign else 0.35)
            if gained.low is not None and gained.high is not None:
                axes.plot([gained.low, gained.high], [place, place], color=INK, linewidth=1.1)
        names = [f"{item.series}  {item.number_format}  {item.method} over {item.base}" for item in items]
        axes.set_yticks(range(len(items)), names, color=INK)
        axes.set_ylim(len(items) - 0.5, -0.5)
        axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel(f"levels gained, of {label_of(figure)}")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
    return drawn


def _figure(height: float) -> tuple[Figure, Axes]:
    drawn = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = drawn.add_subplot()
    _plain(axes)
    return drawn, axes


def _panels(apart: Sequence[Curve], rest: Sequence[Curve]) -> tuple[Figure, list[tuple[Axes, Sequence[Curve]]]]:
    """A panel for the rest, and a small one over it for what is apart, if anything is."""
    if not apart:
        drawn, axes = _figure(_HEIGHT_INCHES)
        return drawn, [(axes, rest)]
    drawn = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES + _INCHES_APART), layout="constrained")
    top, bottom = drawn.subplots(2, 1, sharex=True, height_ratios=[_INCHES_APART, _HEIGHT_INCHES])
    for axes in (top, bottom):
        _plain(axes)
    return drawn, [(top, apart), (bottom, rest)]


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, which="both")


def _break(top: Axes, bottom: Axes) -> None:
    """Slashes where the vertical axis is broken."""
    top.spines["bottom"].set_visible(False)
    top.tick_params(labelbottom=False)
    for axes, place in ((top, 0.0), (bottom, 1.0)):
        axes.plot(
            [0], [place], transform=axes.transAxes, marker=[(-1, -0.6), (1, 0.6)], markersize=6, linestyle="",
            color=INK, clip_on=False,
        )  # fmt: skip


def _widen(axes: Axes, curves: Sequence[Curve]) -> None:
    """Ticks at whole and, over a short axis, at half powers of two."""
    low, high = min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)
    step = 1.0 if high - low > 2.5 else 0.5
    margin = max(0.06 * (high - low), 0.1)
    ticks = np.arange(np.floor(low / step), np.ceil(high / step) + 1) * step
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    axes.set_xticks([2**t for t in ticks if low - margin <= t <= high + margin])
    axes.minorticks_off()


def _marker(cell: Cell, methods: Sequence[str]) -> str:
    if cell.method in _MARKERS:
        return _MARKERS[cell.method]
    others = [name for name in methods if name not in _MARKERS]
    return _OTHER_MARKERS[others.index(cell.method) % len(_OTHER_MARKERS)]


def _line(cell: Cell) -> Any:
    """Dashes for floating point; full precision is no format among others."""
    return (0, (4, 2)) if cell.number_format.startswith("fp") and cell.method != "none" else "-"
