"""Curves of a scaling law: quality of one format and method over the sizes of a series, against log₂ of bits.

Between two sizes a curve is a straight line (in log₂ bits); beyond its ends it is not defined: nothing is
extrapolated. Every curve carries resamples, so that whatever is computed from curves has an interval.

Legend: S sizes, R resamples, P places on an axis.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from qexport.scaling.axes import TOTAL
from qexport.scaling.figures import FD, FIGURES, RESAMPLES, draws, resampled
from qexport.scaling.grid import Run
from qexport.scaling.select import Selection
from qexport.scaling.store import Row

Z_95 = 1.96


@dataclass(frozen=True)
class Cell:
    """What a curve is of."""

    series: str
    number_format: str
    method: str

    def __str__(self) -> str:
        return self.number_format if self.method == "none" else f"{self.number_format} {self.method}"


@dataclass(frozen=True, eq=False)
class Curve:
    """`x` (S,) is log₂ bits, rising; `y` (S,) the figure, smaller is better; `samples` (R, S) it in every resample."""

    cell: Cell
    models: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    samples: np.ndarray

    @property
    def bits(self) -> int:
        """Nominal width."""
        return Run("", self.cell.number_format).bits


def curves_of(selection: Selection, series: str, figure: str, axis: str = TOTAL) -> dict[Cell, Curve]:
    """Every curve of a series, by its cell; one point is a curve too."""
    points: dict[Cell, list[Row]] = {}
    for run, row in selection.rows.items():
        if run.series == series and figure in row.measured.figures:
            points.setdefault(Cell(series, run.number_format, run.method), []).append(row)
    curves = {}
    for cell, rows in points.items():
        rows.sort(key=lambda row: row.measured.cost[axis])
        curves[cell] = Curve(
            cell,
            tuple(row.run.model for row in rows),
            np.log2([float(row.measured.cost[axis]) for row in rows]),
            np.array([float(row.measured.figures[figure]["value"]) for row in rows]),
            np.stack([samples_of(row, figure) for row in rows], axis=1),
        )
    return curves


def samples_of(row: Row, figure: str) -> np.ndarray:
    """The figure in every resample (R,). Rows on the same images share their resamples.

    FD keeps no images: its interval is taken for a normal distribution of its own, independent of other rows'. Rows
    share noise, so differences are in truth better known than this says.
    """
    if figure == FD:
        found = row.measured.figures[FD]
        spread = (float(found["ci95"][1]) - float(found["value"])) / Z_95
        seed = int.from_bytes(hashlib.sha256(row.key.encode()).digest()[:8])
        return float(found["value"]) + spread * np.random.default_rng(seed).standard_normal(RESAMPLES)
    arrays = row.measured.per_image
    known = FIGURES[figure]
    return resampled(known, arrays, draws(len(arrays[known.columns[0]])))


def height(x_S: np.ndarray, y_S: np.ndarray, at_P: np.ndarray) -> np.ndarray:
    """The curve at places of the x axis (P,); NaN beyond its ends."""
    return np.interp(at_P, x_S, y_S, left=np.nan, right=np.nan)


def offset(x_S: np.ndarray, y_S: np.ndarray, reference_x: np.ndarray, reference_y: np.ndarray) -> float:
    """How far a curve lies left of the reference: the mean of x_ref(y) − x(y) over the qualities y that both reach.

    In log₂ bits: 1 is half the bits at equal quality. NaN where they share no quality, or where a curve does not fall
    all the way, so that a quality has no one place on it.
    """
    if len(y_S) < 2 or len(reference_y) < 2 or not (np.diff(y_S) < 0).all() or not (np.diff(reference_y) < 0).all():
        return float("nan")
    low, high = max(y_S[-1], reference_y[-1]), min(y_S[0], reference_y[0])
    if not low < high:
        return float("nan")
    knots = np.unique(np.concatenate([y_S, reference_y, [low, high]]))
    knots = knots[(knots >= low) & (knots <= high)]
    gap = np.interp(knots, reference_y[::-1], reference_x[::-1]) - np.interp(knots, y_S[::-1], x_S[::-1])
    return float(np.trapezoid(gap, knots) / (high - low))
