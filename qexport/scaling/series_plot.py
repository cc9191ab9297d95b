"""Several series in one plot: every curve of each, thin, and over them the lowest at each size in bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from qexport.scaling.at_equal_bits import lowest
from qexport.scaling.axes import AXES
from qexport.scaling.curves import height
from qexport.scaling.figures import interval, label_of
from qexport.scaling.law import SeriesLaw
from qexport.verify.plots import COLOURS, GRID, INK, STYLE

_INCHES = 6.4, 4.0
_PLACES = 200
_TALLEST = 1.6
"""The axis ends at so many times the highest of the lowest curves: what lies above is of no use to anybody."""


def series_plot(laws: Mapping[str, SeriesLaw], figure: str) -> Figure | None:
    """The figure of at least two series against the bits on their axis; None where fewer have it.

    Bars are 95 % intervals of the points that lie on the lowest curve.
    """
    shown = {name: list(law.curves[figure].values()) for name, law in laws.items() if figure in law.curves}
    if len(shown) < 2:
        return None
    axis = AXES[next(iter(laws.values())).axis]
    highest = 0.0
    with rc_context(STYLE):
        drawn = Figure(figsize=_INCHES, layout="constrained")
        axes = drawn.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for number, (series, curves) in enumerate(shown.items()):
            colour = COLOURS[number % len(COLOURS)]
            for curve in curves:
                axes.plot(2**curve.x, curve.y, color=colour, linewidth=0.6, alpha=0.35)
            ends = min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)
            places = np.linspace(*ends, _PLACES)
            best = lowest(curves, places)
            y = np.array(
                [np.nan if c is None else height(c.x, c.y, np.array([p]))[0] for c, p in zip(best, places, strict=True)]
            )
            axes.plot(2**places, y, color=colour, linewidth=1.8, label=series)
            highest = max(highest, float(np.nanmax(y)))
            for curve in curves:
                for place, value, samples in zip(curve.x, curve.y, curve.samples.T, strict=True):
                    (under,) = lowest(curves, np.array([place]))
                    if under is curve:
                        low, high = interval(samples)
                        reach = [[max(value - low, 0)], [max(high - value, 0)]]
                        axes.errorbar(
                            [2**place], [value], yerr=reach, color=colour, marker="o", markersize=3.4, elinewidth=0.8,
                            capsize=1.5,
                        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"2$^{{{np.log2(value):.3g}}}$"))
        axes.minorticks_off()
        axes.set_ylim(0, _TALLEST * highest)
        axes.set_xlabel(axis.label)
        axes.set_ylabel(label_of(figure))
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return drawn
