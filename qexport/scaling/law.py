"""The law of one series: what its curves say about bits, each with an interval, *not shown* where that does not decide.

- *offset* of a width and method: how many log₂ bits its curve saves at equal quality, against full precision's
- *levels gained* by a method: see `qexport.scaling.levels`
- *best* at a size in bits: the lowest curve there, against the lowest of another width
- *degraded*: how much worse than full precision of the same size, Σ q_k / Σ q_16 − 1, sums over sizes; without a
  unit, so that series of different figures can be set side by side
- *fits*: power laws, see `qexport.scaling.fits`; of integers and floating point together, and of each alone

Offsets and the best width depend on the kind of bits on the axis; the others do not.

Legend: S sizes, R resamples, P places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qexport.errors import InputError
from qexport.scaling.at_equal_bits import PLACES, heights
from qexport.scaling.axes import TOTAL
from qexport.scaling.curves import Cell, Curve, curves_of, height, offset, samples_of
from qexport.scaling.estimate import Estimate, estimate
from qexport.scaling.figures import FD
from qexport.scaling.fits import Fit, fit_with_intervals
from qexport.scaling.grid import FULL, KINDS
from qexport.scaling.int_or_fp import KindRatio, kind_ratios
from qexport.scaling.levels import BASES, Levels, levels
from qexport.scaling.recommend import quality_of
from qexport.scaling.select import Selection

MERITS = ("kl", "output_mse")
TOGETHER = " and ".join(KINDS)
"""Power laws of all kinds of number; those of one kind go by its name."""


@dataclass(frozen=True)
class Best:
    """At `log2_bits`, the lowest curve, the lowest of another width, and how far that one lies above: is the width
    better for certain?
    """

    log2_bits: float
    best: Cell
    second: Cell | None
    gap: Estimate


@dataclass(frozen=True)
class Offset:
    """log₂ bits that a curve saves at equal quality, against full precision's of the same series."""

    cell: Cell
    figure: str
    saved: Estimate


@dataclass(frozen=True)
class Degraded:
    """Share by which a format and method is worse than full precision, over so many sizes; `samples` are resamples."""

    cell: Cell
    figure: str
    share: Estimate
    samples: np.ndarray
    sizes: int


@dataclass(frozen=True, eq=False)
class SeriesLaw:
    """Everything about one series; `quality` tells sizes apart (None: no such figure), `merit` is against the own full
    precision. `fits` are by figure, then by kind of number; a text says why there is none.
    """

    series: str
    axis: str
    quality: str | None
    merit: str | None
    curves: Mapping[str, Mapping[Cell, Curve]]
    offsets: Sequence[Offset]
    levels: Sequence[Levels]
    degraded: Sequence[Degraded]
    best: Sequence[Best]
    kinds: Sequence[KindRatio]
    fits: Mapping[str, Mapping[str, Fit | str]]


def series_law(selection: Selection, series: str, axis: str = TOTAL) -> SeriesLaw:
    """The law of one series, quality against `axis`."""
    rows = [row for run, row in selection.rows.items() if run.series == series]
    quality = quality_of(selection, rows)
    merit = next((name for name in MERITS if any(name in row.measured.figures for row in rows)), None)
    figures = list(dict.fromkeys(name for name in (quality, merit, FD) if name))
    curves = {name: curves_of(selection, series, name, axis) for name in figures}
    curves = {name: found for name, found in curves.items() if found}
    judged = curves.get(quality or "", {})
    return SeriesLaw(
        series=series,
        axis=axis,
        quality=quality,
        merit=merit,
        curves=curves,
        offsets=offsets(judged, quality or ""),
        levels=[found for name in curves for found in levels(curves[name], name)],
        degraded=[
            found for name in dict.fromkeys((quality, FD)) for found in degraded(curves.get(name or "", {}), name)
        ],
        best=best_at(list(judged.values())),
        kinds=kind_ratios(curves[merit], merit) if merit else [],
        fits={
            name: {
                " and ".join(kinds): _fit(selection, series, name, kinds, seed)
                for seed, kinds in enumerate([tuple(KINDS), *((kind,) for kind in KINDS)])
            }
            for name in figures
        },
    )


def offsets(curves: Mapping[Cell, Curve], figure: str) -> list[Offset]:
    """Offsets of all curves against full precision's; see `qexport.scaling.curves.offset`."""
    full = next((curve for cell, curve in curves.items() if cell.number_format == FULL), None)
    if full is None:
        return []
    found = []
    for cell, curve in curves.items():
        if curve is full:
            continue
        samples = [
            offset(curve.x, y, full.x, reference) for y, reference in zip(curve.samples, full.samples, strict=True)
        ]
        value = offset(curve.x, curve.y, full.x, full.y)
        found.append(Offset(cell, figure, estimate(value, np.array(samples))))
    return found


def degraded(curves: Mapping[Cell, Curve], figure: str | None) -> list[Degraded]:
    """How much worse every curve is than full precision's; see module."""
    full = next((curve for cell, curve in curves.items() if cell.number_format == FULL), None)
    if full is None or figure is None:
        return []
    found = []
    for cell, curve in curves.items():
        common = [model for model in curve.models if model in full.models]
        if curve is full or not common:
            continue
        mine, whole = ([c.models.index(model) for model in common] for c in (curve, full))
        value = curve.y[mine].sum() / full.y[whole].sum() - 1
        samples = curve.samples[:, mine].sum(axis=1) / full.samples[:, whole].sum(axis=1) - 1
        found.append(Degraded(cell, figure, estimate(float(value), samples), samples, len(common)))
    return found


def best_at(curves: Sequence[Curve]) -> list[Best]:
    """The lowest curve at places between the smallest and the largest size in bits."""
    if not curves:
        return []
    low, high = min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves)
    places = np.linspace(low, high, PLACES)
    at_CP = np.stack([height(curve.x, curve.y, places) for curve in curves])
    found = []
    for number, place in enumerate(places):
        defined = [i for i in np.argsort(at_CP[:, number]) if np.isfinite(at_CP[i, number])]
        if not defined:
            continue
        first = curves[defined[0]]
        other = next((i for i in defined if curves[i].bits != first.bits), None)
        if other is None:
            found.append(Best(float(place), first.cell, None, Estimate(None)))
            continue
        second = curves[other]
        gap = heights(second, float(place)) - heights(first, float(place))
        value = at_CP[other, number] - at_CP[defined[0], number]
        found.append(Best(float(place), first.cell, second.cell, estimate(float(value), gap)))
    return found


def _fit(selection: Selection, series: str, figure: str, kinds: Collection[str], seed: int) -> Fit | str:
    """The power law over all sizes and these kinds by round-to-nearest, or why there is none. Full precision counts
    among all kinds, where the figure is not relative to it. Fits of other seeds draw their runs independently.
    """
    rows = [
        row
        for run, row in selection.rows.items()
        if run.series == series
        and figure in row.measured.figures
        and (
            (run.method == BASES[0] and run.kind in kinds)
            or (run.number_format == FULL and figure not in MERITS and len(kinds) == len(KINDS))
        )
    ]
    bits = np.array([float(row.measured.cost["information_bits_per_weight"]) for row in rows])
    parameters = np.array([float(row.measured.cost["parameters"]) for row in rows])
    values = np.array([float(row.measured.figures[figure]["value"]) for row in rows])
    try:
        return fit_with_intervals(parameters, bits, values, [samples_of(row, figure) for row in rows], seed)
    except InputError as error:
        return str(error)
