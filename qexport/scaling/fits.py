"""Fits of a scaling law, by least squares in log space, with their residuals.

    ln y = a − α · ln N − β · ln b        (N parameters, b bits a weight: a bivariate power law)

After Dettmers and Zettlemoyer, "The case for 4-bit precision" (arXiv:2212.09720), who found that such laws fit poorly
and that straight lines between sizes describe the data; so the residuals are part of the result. `y` is a quality or
how much of it is lost.

Intervals are percentiles over resamples that draw the runs with replacement and, of each run, the images that it was
judged on: few runs that a law does not describe well say little about its coefficients, however many images there were.

Legend: N runs, R resamples, C coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.scaling.estimate import Estimate, estimate
from qexport.scaling.figures import draws

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


@dataclass(frozen=True, eq=False)
class Fit:
    """A law with intervals; `samples` (R, 4) are a, α, β and R² of every resample, NaN where it leaves none."""

    law: PowerLaw
    a: Estimate
    alpha: Estimate
    beta: Estimate
    r2: Estimate
    samples: np.ndarray


def fit_power_law(parameters: np.ndarray, bits: np.ndarray, y: np.ndarray) -> PowerLaw:
    """Fit the law to points (n,), all positive.

    Raises:
        InputError: fewer points than would leave a residual, a value that has no logarithm, or points that do not tell
            N and b apart.
    """
    design = _design(parameters, bits, y)
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


def fit_with_intervals(
    parameters: np.ndarray, bits: np.ndarray, y: np.ndarray, samples: Sequence[np.ndarray], seed: int = 0
) -> Fit:
    """The fit with its intervals; `samples` holds each run's `y` in every resample of its images (R,).

    Raises:
        InputError: see `fit_power_law`.
    """
    law = fit_power_law(parameters, bits, y)
    y_RN = np.stack(samples, axis=1)
    counts_RN = draws(len(y), seed, len(y_RN))
    found = _resampled(_design(parameters, bits, y), y_RN, counts_RN)
    values = (law.a, law.alpha, law.beta, law.r2)
    return Fit(law, *(estimate(value, column) for value, column in zip(values, found.T, strict=True)), samples=found)


def _resampled(design_NC: np.ndarray, y_RN: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
    """Coefficients and R² (R, 4), runs counted as often as they were drawn; see `Fit`."""
    found = np.full((len(y_RN), COEFFICIENTS + 1), np.nan)
    root_RN = np.sqrt(counts_RN)
    weighted_RNC = root_RN[:, :, None] * design_NC
    # A resample may hold one size or one width only, or a value that has no logarithm.
    good = (np.linalg.matrix_rank(weighted_RNC) == COEFFICIENTS) & (y_RN > 0).all(axis=1)
    target_RN, counts_RN = np.log(y_RN[good]), counts_RN[good]
    solution_RC = (np.linalg.pinv(weighted_RNC[good]) @ (root_RN[good] * target_RN)[:, :, None])[:, :, 0]
    residual_RN = target_RN - solution_RC @ design_NC.T
    mean_R1 = (counts_RN * target_RN).sum(axis=1, keepdims=True) / counts_RN.sum(axis=1, keepdims=True)
    spread_R = (counts_RN * (target_RN - mean_R1) ** 2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        r2_R = 1 - (counts_RN * residual_RN**2).sum(axis=1) / spread_R
    found[good] = np.column_stack([solution_RC, r2_R])
    return found


def _design(parameters: np.ndarray, bits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Columns 1, −ln N, −ln b (N, C).

    Raises:
        InputError: see `fit_power_law`.
    """
    if len(y) <= COEFFICIENTS:
        raise InputError(f"a power law in two variables needs more than {COEFFICIENTS} points; there are {len(y)}")
    if not (np.min(parameters) > 0 and np.min(bits) > 0 and np.min(y) > 0):
        raise InputError("a power law needs positive numbers")
    design = np.stack([np.ones(len(y)), -np.log(parameters), -np.log(bits)], axis=1)
    if np.linalg.matrix_rank(design) < COEFFICIENTS:
        raise InputError("a power law in two variables needs several sizes at several widths")
    return design
