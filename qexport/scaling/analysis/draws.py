"""Every draw that two models were compared in, and the figures that are made of them, with intervals.

Draws of one image depend on each other, so resamples draw images with all their draws; a figure is a ratio of sums, and
that a resample holds more draws of one bin than another is part of its spread.

Legend: R draws, N images, K bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qexport.scaling.analysis.resampled import Resampled, estimate, ratio

BINS = 10
"""Draws are sorted by KL into so many equal bins."""

KL_EDGES = np.geomspace(1e-3, 10, 41)
"""Bins that are the same for every pair of models: a quarter apart, so that within one the KL hardly differs."""

COLUMNS = ("kl", "tv", "logit_error", "flip", "hard", "soft", "code", "mean", "race_flip", "race_hard", "race_code")

_RATIOS = {
    **{name: (name, "draws") for name in ("kl", "tv", "logit_error", "flip", "race_flip")},
    "hard": ("hard", "code"),
    "race_hard": ("race_hard", "race_code"),
    "soft": ("soft", "mean"),
    "hard_over_soft": ("hard", "soft"),
    "race_hard_over_soft": ("race_hard", "soft"),
    "flip_over_tv": ("flip", "tv"),
    "race_flip_over_tv": ("race_flip", "tv"),
}
"""Figure → the two sums that it is the ratio of."""


@dataclass(frozen=True)
class Draws:
    """One row a draw: `call` and `image` (R,) int64, and `COLUMNS` as `flips` defines them, (R,) float64 each."""

    call: np.ndarray
    image: np.ndarray
    columns: Mapping[str, np.ndarray]
    samples: int

    def per_call(self) -> list[dict[str, Resampled]]:
        """Figures of each call; `hard` and `soft` relative to the mean of `code` and of `mean`."""
        return [self._summary(self.call == call) for call in range(int(self.call.max()) + 1)]

    def overall(self) -> dict[str, Resampled]:
        """The same over all draws."""
        return self._summary(np.ones(len(self.call), np.bool_))

    def by_error(self) -> list[dict[str, Resampled]]:
        """The same for each of `BINS` equal shares of the draws, in order of KL; shares are not sorted anew."""
        order = np.argsort(self.columns["kl"], kind="stable")
        found = []
        for part in np.array_split(order, BINS):
            chosen = np.zeros(len(order), np.bool_)
            chosen[part] = True
            found.append(self._summary(chosen))
        return found

    def counted(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Sum of a column, and number of draws, of each image in each bin of `KL_EDGES`; (N, K) both."""
        bins = np.digitize(self.columns["kl"], KL_EDGES)
        shape = (self.samples, len(KL_EDGES) + 1)
        cell = self.image * shape[1] + bins
        sums, counts = (np.bincount(cell, weight, np.prod(shape)) for weight in (self.columns[name], None))
        return sums.reshape(shape), counts.reshape(shape)

    def _summary(self, chosen: np.ndarray) -> dict[str, Resampled]:
        owner = self.image[chosen]
        columns = {**self.columns, "draws": np.ones(len(self.call))}
        sums = {name: np.bincount(owner, column[chosen], self.samples) for name, column in columns.items()}
        found = {name: estimate(ratio, sums[above], sums[below]) for name, (above, below) in _RATIOS.items()}
        return {"draws": estimate(lambda mean: mean * self.samples, sums["draws"]), **found}


def at_equal_kl(one: Draws, other: Draws, name: str = "race_flip") -> Resampled:
    """How much greater the mean of a column is in `other` than in `one` between draws of the same KL.

    Σ_k w_k (mean of other − mean of one) / Σ_k w_k over the bins of `KL_EDGES`, w = n n′ / (n + n′) of the draws in a
    bin: the difference of Mantel and Haenszel. NaN where no bin holds draws of both. Both are of the same images.
    """

    def combine(x: np.ndarray, n: np.ndarray, y: np.ndarray, m: np.ndarray) -> np.ndarray:
        both = np.maximum(n + m, np.finfo(np.float64).tiny)
        return ratio(((y * n - x * m) / both).sum(axis=-1), (n * m / both).sum(axis=-1))

    return estimate(combine, *one.counted(name), *other.counted(name))
