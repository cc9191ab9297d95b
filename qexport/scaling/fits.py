"""Fits of a scaling law, by least squares in log space, with their residuals.

    ln y = a − α · ln N − β · ln b        (N parameters, b bits a weight: a bivariate power law)

After Dettmers and Zettlemoyer, "The case for 4-bit precision" (arXiv:2212.09720), who found that such laws fit poorly
and that straight lines between sizes describe the data; so the residuals are part of the result. `y` is a quality or
how much of it is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.errors import InputError

COEFFICIENTS = 3


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(a) · N^−α · b^−β; `rms` and `worst` are residuals of ln y, `r2` the share of its variance explained."""

    a: float
    alpha: float
    beta: float
    rms: float
    worst: float
    r2: float
    points: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self)


def fit_power_law(parameters: np.ndarray, bits: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Fit the law to points (n,), all positive.

    Raises:
        InputError: fewer points than would leave a residual, a value that has no logarithm, or points that do not tell
            N and b apart.
    """
    if len(y) <= COEFFICIENTS:
        raise InputError(f"a power law in two variables needs more than {COEFFICIENTS} points; there are {len(y)}")
    if not (np.min(parameters) > 0 and np.min(bits) > 0 and np.min(y) > 0):
        raise InputError("a power law needs positive numbers")
    design = np.stack([np.ones(len(y)), -np.log(parameters), -np.log(bits)], axis=1)
    if np.linalg.matrix_rank(design) < COEFFICIENTS:
        raise InputError("a power law in two variables needs several sizes at several widths")
    target = np.log(y)
    solution, *_ = np.linalg.lstsq(design, target)
    residual = target - design @ solution
    spread = float(((target - target.mean()) ** 2).sum())
    return PowerLaw(
        *(float(v) for v in solution),
        rms=float(np.sqrt((residual**2).mean())),
        worst=float(np.abs(residual).max()),
        r2=1 - float((residual**2).sum()) / spread if spread else 1.0,
        points=len(y),
    )
