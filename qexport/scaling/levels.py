"""Levels gained: how much of the way from k bits to the next width a method goes at k bits' cost.

Σ (q_k − q_k,method) / Σ (q_k − q_next), sums over sizes, `q` the base method's figure; 1 is one level. A size alone has
its own quotient, on the same resamples, so that two sizes have a difference with an interval.

Legend: R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from qexport.scaling.curves import Cell, Curve
from qexport.scaling.estimate import Estimate, estimate
from qexport.scaling.grid import KINDS, NO_METHOD

BASES = ("rtn", "gptq")
"""Methods that others are measured against, where they are there."""


@dataclass(frozen=True, eq=False)
class SizeLevels:
    """Levels that are gained at one size; `beyond` is by how many more than at the size before it, where both are."""

    model: str
    gained: Estimate
    beyond: Estimate


@dataclass(frozen=True)
class Levels:
    """Levels that `method` gains over `base` at `number_format`, the next width being `next_format`; `by_size` is in
    order of size.
    """

    series: str
    figure: str
    number_format: str
    next_format: str
    base: str
    method: str
    gained: Estimate
    sizes: int
    by_size: Sequence[SizeLevels] = field(compare=False, default=())


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
                    common = [m for m in start.models if m in step.models and m in other.models]
                    if common:
                        gained = estimate(*_quotient((start, step, other), common))
                        sizes = _by_size((start, step, other), common)
                        found.append(Levels(series, figure, low, high, base, method, gained, len(common), sizes))
    return found


def _quotient(triple: tuple[Curve, Curve, Curve], models: Sequence[str]) -> tuple[float, np.ndarray]:
    """Levels over these models, and in every resample (R,); NaN where the step does not help."""
    columns = [[curve.models.index(model) for model in models] for curve in triple]

    def ratio(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        gap = (first - second).sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A step that does not help is no unit to measure by.
            return np.where(gap > 0, (first - third).sum(axis=-1) / gap, np.nan)

    pairs = tuple(zip(triple, columns, strict=True))
    value = ratio(*(curve.y[index] for curve, index in pairs))
    return float(value), ratio(*(curve.samples[:, index] for curve, index in pairs))


def _by_size(triple: tuple[Curve, Curve, Curve], models: Sequence[str]) -> list[SizeLevels]:
    found: list[SizeLevels] = []
    last: tuple[float, np.ndarray] | None = None
    for model in models:
        value, samples = _quotient(triple, [model])
        beyond = Estimate(None) if last is None else estimate(value - last[0], samples - last[1])
        found.append(SizeLevels(model, estimate(value, samples), beyond))
        last = value, samples
    return found
