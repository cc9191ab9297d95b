"""The law: what curves say about bits, each with an interval, and *not shown* where the interval does not decide.

- *offset* of a width and method: how many log₂ bits its curve saves at equal quality, against full precision's
- *levels gained* by a method at k bits: how much of the way from k to the next width it goes at k bits' cost,
  Σ (q_k − q_k,method) / Σ (q_k − q_next), sums over sizes, `q` the base method's figure. 1 is one level.
- *best* at a size in bits: the lowest curve there, against the lowest of another width
- *degraded*: how much worse than full precision of the same size, Σ q_k / Σ q_16 − 1, sums over sizes; without a
  unit, so that series of different figures can be set side by side
- *series compared*: at equal total bits, the mean difference of FD over the sizes that both reach

Legend: S sizes, R resamples, P places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.scaling.curves import TOTAL, Cell, Curve, curves_of, height, offset
from qexport.scaling.figures import FD, interval
from qexport.scaling.fits import PowerLaw, fit_power_law
from qexport.scaling.grid import FULL, KINDS, NO_METHOD
from qexport.scaling.recommend import quality_of
from qexport.scaling.select import Selection

LEAST_DEFINED = 0.95
"""Share of resamples in which a figure must be defined for it to have an interval."""

PLACES = 25
"""Sizes in bits at which curves are compared."""

MERITS = ("kl", "output_mse")
BASES = ("rtn", "gptq")
"""Methods that others are measured against, where they are there."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or −1 where the whole interval lies on that side of zero, else 0: not shown."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"value": self.value, "ci95": None if self.low is None else [self.low, self.high]}


def estimate(value: float, samples_R: np.ndarray) -> Estimate:
    """The estimate with the percentile interval of its resamples."""
    if not np.isfinite(value):
        return Estimate(None)
    defined = samples_R[np.isfinite(samples_R)]
    if len(defined) < LEAST_DEFINED * len(samples_R):
        return Estimate(float(value))
    return Estimate(float(value), *interval(defined))


@dataclass(frozen=True)
class Levels:
    """Levels that `method` gains over `base` at `number_format`, the next width being `next_format`."""

    series: str
    figure: str
    number_format: str
    next_format: str
    base: str
    method: str
    gained: Estimate
    sizes: int


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


@dataclass(frozen=True)
class Compared:
    """FD of series `a` minus that of `b` at equal total bits, mean over the sizes in bits that both reach."""

    a: Cell
    b: Cell
    difference: Estimate
    log2_bits: tuple[float, float] | None


@dataclass(frozen=True, eq=False)
class SeriesLaw:
    """Everything about one series; `quality` tells sizes apart (None: no such figure), `merit` is against the own full
    precision. `fits` are by figure.
    """

    series: str
    quality: str | None
    merit: str | None
    curves: Mapping[str, Mapping[Cell, Curve]]
    offsets: Sequence[Offset]
    levels: Sequence[Levels]
    degraded: Sequence[Degraded]
    best: Sequence[Best]
    fits: Mapping[str, PowerLaw | str]


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
        quality=quality,
        merit=merit,
        curves=curves,
        offsets=offsets(judged, quality or ""),
        levels=[found for name in curves for found in levels(curves[name], name)],
        degraded=[
            found for name in dict.fromkeys((quality, FD)) for found in degraded(curves.get(name or "", {}), name)
        ],
        best=best_at(list(judged.values())),
        fits={name: _fit(selection, series, name) for name in figures},
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


def levels(curves: Mapping[Cell, Curve], figure: str) -> list[Levels]:
    """Levels gained by every method over every base, at every width that has a next one; see module."""
    found = []
    series = next(iter(curves)).series
    methods = dict.fromkeys(cell.method for cell in curves if cell.method != NO_METHOD)
    for widths in KINDS.values():
        names = [widths[bits] for bits in sorted(widths)]
        there = [name for name in names if any(cell.number_format == name for cell in curves)]
        for low, high in pairwise(there):
            for base in BASES:
                start, step = curves.get(Cell(series, low, base)), curves.get(Cell(series, high, base))
                if start is None or step is None:
                    continue
                for method in methods:
                    other = curves.get(Cell(series, low, method))
                    if method in BASES[: BASES.index(base) + 1] or other is None:
                        continue
                    gained, sizes = _levels(start, step, other)
                    if sizes:
                        found.append(Levels(series, figure, low, high, base, method, gained, sizes))
    return found


def _levels(start: Curve, step: Curve, other: Curve) -> tuple[Estimate, int]:
    common = [model for model in start.models if model in step.models and model in other.models]
    if not common:
        return Estimate(None), 0
    columns = [[curve.models.index(model) for model in common] for curve in (start, step, other)]

    def ratio(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        gap = (first - second).sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A step that does not help is no unit to measure by.
            return np.where(gap > 0, (first - third).sum(axis=-1) / gap, np.nan)

    triple = tuple(zip((start, step, other), columns, strict=True))
    value = ratio(*(curve.y[index] for curve, index in triple))
    samples = ratio(*(curve.samples[:, index] for curve, index in triple))
    return estimate(float(value), samples), len(common)


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
        gap = _heights(second, place) - _heights(first, place)
        value = at_CP[other, number] - at_CP[defined[0], number]
        found.append(Best(float(place), first.cell, second.cell, estimate(float(value), gap)))
    return found


def compare_series(a: Mapping[Cell, Curve], b: Mapping[Cell, Curve]) -> list[Compared]:
    """FD of both series at equal total bits, for every format and method that both have."""
    found = []
    for cell, curve in a.items():
        other = next((c for c in b if (c.number_format, c.method) == (cell.number_format, cell.method)), None)
        if other is None:
            continue
        low, high = max(curve.x[0], b[other].x[0]), min(curve.x[-1], b[other].x[-1])
        if not low < high:
            found.append(Compared(cell, other, Estimate(None), None))
            continue
        places = np.linspace(low, high, PLACES)
        value = (height(curve.x, curve.y, places) - height(b[other].x, b[other].y, places)).mean()
        samples = [
            (height(curve.x, y, places) - height(b[other].x, z, places)).mean()
            for y, z in zip(curve.samples, b[other].samples, strict=True)
        ]
        found.append(Compared(cell, other, estimate(float(value), np.array(samples)), (float(low), float(high))))
    return found


def _heights(curve: Curve, place: float) -> np.ndarray:
    return np.array([height(curve.x, y, np.array([place]))[0] for y in curve.samples])


def _fit(selection: Selection, series: str, figure: str) -> PowerLaw | str:
    """The power law over all sizes and widths by round-to-nearest, or why there is none. Full precision counts where
    the figure is not relative to it.
    """
    rows = [
        row
        for run, row in selection.rows.items()
        if run.series == series
        and figure in row.measured.figures
        and (run.method == BASES[0] or (run.number_format == FULL and figure not in MERITS))
    ]
    bits = np.array([float(row.measured.cost["information_bits_per_weight"]) for row in rows])
    parameters = np.array([float(row.measured.cost["parameters"]) for row in rows])
    values = np.array([float(row.measured.figures[figure]["value"]) for row in rows])
    try:
        return fit_power_law(parameters, bits, values)
    except InputError as error:
        return str(error)
