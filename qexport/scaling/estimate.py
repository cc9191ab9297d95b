"""A value with its 95 % interval, made of resamples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.scaling.figures import interval

LEAST_DEFINED = 0.95
"""Share of resamples in which a figure must be defined for it to have an interval."""


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


def words(found: Estimate, digits: int = 3) -> str:
    """``0.74 (0.69 … 0.80)``."""
    if found.value is None:
        return "not defined"
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}g} (no interval: undefined in too many resamples)"
    return f"{found.value:.{digits}g} ({found.low:.{digits}g} … {found.high:.{digits}g})"
