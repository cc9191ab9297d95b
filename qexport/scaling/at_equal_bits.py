"""Two series at equal bits: by FD, the one figure that all have.

Of one format and method at a time; and the lowest curve of the one against the lowest of the other, whatever their
widths, for where the same width of both reaches no common size. Which curves are lowest is decided once, by the
measured figures, and not anew in every resample: the lowest of many that are equally good would look better than each.

Legend: C curves, P places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qexport.scaling.curves import Cell, Curve, height
from qexport.scaling.estimate import Estimate, estimate

PLACES = 25
"""Sizes in bits at which curves are compared."""


@dataclass(frozen=True)
class Compared:
    """The figure of series `a` minus that of `b` at equal bits, mean over the sizes in bits that both reach."""

    a: Cell
    b: Cell
    difference: Estimate
    log2_bits: tuple[float, float] | None


@dataclass(frozen=True)
class Lowest:
    """The lowest of `a` minus the lowest of `b`, mean over the sizes that both reach; `cells` are the curves that are
    lowest somewhere, those of `a` and those of `b`.
    """

    difference: Estimate
    log2_bits: tuple[float, float]
    cells: tuple[tuple[Cell, ...], tuple[Cell, ...]]


def compare_series(a: Mapping[Cell, Curve], b: Mapping[Cell, Curve]) -> list[Compared]:
    """Both series at equal bits, for every format and method that both have."""
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


def compare_lowest(a: Sequence[Curve], b: Sequence[Curve]) -> Lowest | None:
    """The lowest curves of both; None where they reach no common size in bits."""
    if not a or not b:
        return None
    low = max(min(curve.x[0] for curve in curves) for curves in (a, b))
    high = min(max(curve.x[-1] for curve in curves) for curves in (a, b))
    if not low < high:
        return None
    places = np.linspace(low, high, PLACES)
    first, second = lowest(a, places), lowest(b, places)
    both = [number for number in range(PLACES) if first[number] is not None and second[number] is not None]
    if not both:
        return None
    values, samples = [], []
    for number in both:
        x, y = first[number], second[number]
        assert x is not None
        assert y is not None
        at = places[number : number + 1]
        values.append(height(x.x, x.y, at)[0] - height(y.x, y.y, at)[0])
        samples.append(heights(x, float(at[0])) - heights(y, float(at[0])))
    cells = tuple(
        tuple(dict.fromkeys(curve.cell for number in both if (curve := of[number]) is not None))
        for of in (first, second)
    )
    span = float(places[both[0]]), float(places[both[-1]])
    return Lowest(estimate(float(np.mean(values)), np.mean(samples, axis=0)), span, (cells[0], cells[1]))


def lowest(curves: Sequence[Curve], places: np.ndarray) -> list[Curve | None]:
    """At each place the lowest curve; None where there is none."""
    at_CP = np.stack([height(curve.x, curve.y, places) for curve in curves])
    return [curves[int(np.nanargmin(column))] if np.isfinite(column).any() else None for column in at_CP.T]


def heights(curve: Curve, place: float) -> np.ndarray:
    """The curve at a place of the x axis in every resample."""
    return np.array([height(curve.x, y, np.array([place]))[0] for y in curve.samples])
