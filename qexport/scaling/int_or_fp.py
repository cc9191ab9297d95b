"""Integers or floating point of the same width: the error of the one as a multiple of the other's.

Σ e_fp / Σ e_int over sizes, `e` a figure that is relative to full precision; and of every size alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qexport.scaling.curves import Cell, Curve
from qexport.scaling.estimate import Estimate, estimate
from qexport.scaling.grid import KINDS


@dataclass(frozen=True)
class KindRatio:
    """Error in `floating` as a multiple of that in `integer`, by `method`; `by_size` maps a model to its own."""

    figure: str
    floating: str
    integer: str
    method: str
    ratio: Estimate
    by_size: Mapping[str, Estimate]


def kind_ratios(curves: Mapping[Cell, Curve], figure: str) -> list[KindRatio]:
    """One for every width and method that both kinds have."""
    found = []
    for cell, curve in curves.items():
        bits = next((b for b, name in KINDS["fp"].items() if name == cell.number_format), None)
        other = curves.get(Cell(cell.series, KINDS["int"].get(bits or 0, ""), cell.method))
        if bits is None or other is None:
            continue
        common = [model for model in curve.models if model in other.models]
        if not common:
            continue
        sizes = {model: _ratio(curve, other, [model]) for model in common}
        found.append(
            KindRatio(
                figure, cell.number_format, other.cell.number_format, cell.method, _ratio(curve, other, common), sizes
            )
        )
    return found


def _ratio(a: Curve, b: Curve, models: list[str]) -> Estimate:
    mine, others = ([curve.models.index(model) for model in models] for curve in (a, b))
    below = float(b.y[others].sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = a.samples[:, mine].sum(axis=1) / b.samples[:, others].sum(axis=1)
    return estimate(float(a.y[mine].sum()) / below if below else float("nan"), samples)
