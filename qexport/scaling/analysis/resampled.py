"""A figure and its bootstrap resamples over images, so that whatever is made of figures has an interval of its own.

Every figure here is a function of sums over images. Images are drawn with replacement as for the law
(`qexport.scaling.figures.draws`: as many images, the same draws), so two figures over the same images (two widths, two
kinds of layer, two settings) move together in the resamples, and the interval of their difference or ratio leaves out
what is common to both. Tokens and steps of one image are never drawn apart: they depend on each other.

Intervals hold 95 % of the resamples. Of 10 to 50 images percentile intervals are somewhat too narrow (by about the
factor √((N − 1)/N), the bootstrap's own variance being that of N − 1), and they know of one seed and one model only.

Legend: N images, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.scaling.figures import TAIL, draws

DIGITS = 5
"""Significant digits that are written: far more than any interval here leaves."""


@dataclass(frozen=True)
class Resampled:
    """`value` (…) over `images` images, and `samples` (R, …) of it; arithmetic is resample by resample."""

    value: np.ndarray
    samples: np.ndarray
    images: int

    def __sub__(self, other: Resampled) -> Resampled:
        return self._with(other, np.subtract)

    def __truediv__(self, other: Resampled) -> Resampled:
        return self._with(other, ratio)

    def __getitem__(self, index: Any) -> Resampled:
        own = index if isinstance(index, tuple) else (index,)
        return Resampled(self.value[own], self.samples[(slice(None), *own)], self.images)

    @property
    def ci95(self) -> np.ndarray:
        """Low and high end, (…, 2), over the resamples in which the figure is defined."""
        undefined = np.isnan(self.samples).all(axis=0)
        samples = np.where(undefined, 0.0, self.samples)  # nanpercentile warns of columns that are all NaN
        tails = [TAIL, 100 - TAIL]
        with np.errstate(invalid="ignore"):
            ends = np.nanpercentile(samples, tails, axis=0)
        if np.isnan(ends).any():  # between two infinite resamples nothing can be interpolated
            ends = np.where(np.isnan(ends), np.nanpercentile(samples, tails, axis=0, method="nearest"), ends)
        return np.moveaxis(np.where(undefined, np.nan, ends), 0, -1)

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``value``, ``ci95`` (pairs, nested as the value is), ``n``; what is not finite is None."""
        return {"value": _plain(self.value), "ci95": _plain(self.ci95), "n": self.images}

    def _with(self, other: Resampled, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Resampled:
        assert self.images == other.images, "figures of different images do not move together"
        samples = combine(self.samples, other.samples)
        return Resampled(np.asarray(combine(self.value, other.value)), samples, self.images)


def estimate(combine: Callable[..., np.ndarray], *columns: np.ndarray) -> Resampled:
    """What `combine` makes of the means over images of columns (N, …), elementwise in the leading dimension R."""
    images = len(columns[0])
    counts_RN = draws(images)
    value = combine(*(np.asarray(column, np.float64).mean(axis=0)[None] for column in columns))[0]
    samples = combine(*(np.tensordot(counts_RN, np.asarray(column, np.float64), axes=1) / images for column in columns))
    return Resampled(np.asarray(value), samples, images)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below; NaN where both are zero, as in a resample that holds none of what is counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(above, below))


def relative_l2(error: np.ndarray, power: np.ndarray) -> np.ndarray:
    """√(Σ (a − b)² / Σ b²) of the two sums; 0 where nothing differs."""
    return np.where(error == 0, 0.0, np.sqrt(ratio(error, power)))


def squares(found: np.ndarray, wanted: np.ndarray, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ (a − b)² and Σ b² of each image, (N,) float64.

    Rows of the arrays (rows, …) are those of the images, or several copies of these, one after the other (guidance).
    """
    reference = wanted.astype(np.float64).reshape(-1, images, wanted[0].size)
    difference = found.astype(np.float64).reshape(reference.shape) - reference
    return np.square(difference).sum(axis=(0, 2)), np.square(reference).sum(axis=(0, 2))


def _plain(array: np.ndarray) -> Any:
    if array.ndim:
        return [_plain(part) for part in array]
    return float(f"{float(array):.{DIGITS}g}") if np.isfinite(array) else None


def to_json(figures: dict[str, Resampled] | Sequence[dict[str, Resampled]]) -> Any:
    """`Resampled.to_json` of figures by name, or of a list of such."""
    if isinstance(figures, dict):
        return {name: figure.to_json() for name, figure in figures.items()}
    return [to_json(each) for each in figures]
