"""FID and the Inception Score from what the network says of images, both with a 95 % bootstrap interval.

FID = ‖μ − μ_r‖² + tr(C + C_r − 2 (C C_r)^½) of Inception's features (Heusel et al. 2017), as in `qexport.verify.fd`;
only the last trace is had in a cheaper way, since it is needed of every resample:

    C = XᵀX / (n − 1) with centred X (n, D), so C C_r has the eigenvalues, but for zeros, of X C_r Xᵀ / (n − 1), (n, n).

That matrix is made once; a resample picks rows and columns of it. Beyond D images C_r^½ C C_r^½ (D, D) is smaller.

IS = exp(mean KL(p(y|x) ‖ p(y))), the marginal p(y) taken over a tenth of the images, averaged over the tenths
(Salimans et al. 2016). Both are biased with n (FID upwards, IS downwards), and a resample, which repeats images, more
so; the interval is therefore the spread of the resamples, laid around the estimate.

Legend: N images, D features, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.verify.fd import RESAMPLES, Z_95, FrechetResult
from qexport.verify.statistics import Statistics

SPLITS = 10
"""Parts of the Inception Score, as it was published and has been reported since."""

SHUFFLE_SEED = 2020
"""torch-fidelity's default. Parts would differ by class where files lie in order of class; with the same order as
torch-fidelity's, the figure is the same too."""

CHUNK = 4096
"""Images whose features are turned to float64 at a time: 64 MiB."""

INDEFINITE_TOLERANCE = 1e-6
"""How far below zero, relative to the greatest, an eigenvalue may lie that stands for zero; features are float32."""


@dataclass(frozen=True)
class InceptionScore:
    """Mean `value` over `splits` parts and their standard `deviation`; 95 % interval `low` … `high`."""

    value: float
    deviation: float
    low: float
    high: float
    splits: int
    images: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "value": self.value, "deviation": self.deviation, "ci95": [self.low, self.high], "splits": self.splits,
            "n": self.images,
        }  # fmt: skip


def frechet(features_ND: np.ndarray, real: Statistics, name: str, seed: int) -> FrechetResult:
    """Distance of generated images from real ones.

    Args:
        features_ND: float32, of the generated images.
        real: of the real images.
        name: of the features.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than two images, features that are not finite, or a reference that is no covariance.
    """
    count = len(features_ND)
    if count < 2:
        raise InputError(f"a Fréchet distance of {count} images; at least 2 are needed")
    if not np.isfinite(features_ND).all():
        raise InputError("Inception's features are not finite; the weights are damaged")
    distance = (_few if count <= len(real.mu) else _many)(features_ND, real)
    value = distance(np.arange(count))
    generator = np.random.default_rng(seed)
    resampled = [distance(generator.integers(0, count, count)) for _ in range(RESAMPLES)]
    spread = Z_95 * float(np.std(resampled, ddof=1))
    return FrechetResult(name, value, max(value - spread, 0.0), value + spread, count, seed)


def _few(features_ND: np.ndarray, real: Statistics) -> Callable[[np.ndarray], float]:
    """The distance of the images picked by indices, for no more images than features."""
    x_ND = features_ND.astype(np.float64)
    centre_D = x_ND.mean(axis=0)
    x_ND -= centre_D
    kernel_NN = x_ND @ real.cov @ x_ND.T

    def distance(picked: np.ndarray) -> float:
        mean_D = x_ND[picked].mean(axis=0)
        trace = ((x_ND[picked] - mean_D) ** 2).sum() / (len(picked) - 1)
        part_NN = kernel_NN[np.ix_(picked, picked)]
        rows_N1 = part_NN.mean(axis=1, keepdims=True)
        part_NN = part_NN - rows_N1 - rows_N1.T + rows_N1.mean()
        return _together(mean_D + centre_D, trace, part_NN / (len(picked) - 1), real)

    return distance


def _many(features_ND: np.ndarray, real: Statistics) -> Callable[[np.ndarray], float]:
    """The same for more images than features."""
    centre_D = features_ND.mean(axis=0, dtype=np.float64)
    values_D, vectors_DD = np.linalg.eigh(real.cov)
    if values_D[0] < -INDEFINITE_TOLERANCE * values_D[-1]:
        raise InputError(f"{real.source}: sigma is no covariance: eigenvalue {values_D[0]:.3g}")
    root_DD = (vectors_DD * np.sqrt(np.maximum(values_D, 0))) @ vectors_DD.T

    def distance(picked: np.ndarray) -> float:
        weight_N = np.bincount(picked, minlength=len(features_ND)).astype(np.float64)
        total_D, scatter_DD = np.zeros_like(centre_D), np.zeros_like(root_DD)
        for start in range(0, len(features_ND), CHUNK):
            x_ND = features_ND[start : start + CHUNK] - centre_D
            weighted_ND = x_ND * weight_N[start : start + CHUNK, None]
            total_D += weighted_ND.sum(axis=0)
            scatter_DD += weighted_ND.T @ x_ND
        mean_D = total_D / len(picked)
        cov_DD = (scatter_DD - len(picked) * np.outer(mean_D, mean_D)) / (len(picked) - 1)
        return _together(mean_D + centre_D, np.trace(cov_DD), root_DD @ cov_DD @ root_DD, real)

    return distance


def _together(mean_D: np.ndarray, trace: float, product: np.ndarray, real: Statistics) -> float:
    """The distance; `product` is symmetric with the eigenvalues of C C_r."""
    values = np.linalg.eigvalsh((product + product.T) / 2)
    if values[0] < -INDEFINITE_TOLERANCE * values[-1]:
        raise InputError(f"{real.source}: sigma is no covariance, a product with it has eigenvalue {values[0]:.3g}")
    away = float(((mean_D - real.mu) ** 2).sum())
    cross = float(np.sqrt(np.maximum(values, 0)).sum())
    return max(away + float(trace) + float(np.trace(real.cov)) - 2 * cross, 0.0)


def inception_score(logits_NC: np.ndarray, splits: int, seed: int) -> InceptionScore:
    """The Inception Score.

    Args:
        logits_NC: of the generated images, without bias.
        splits: parts that the marginal is taken over, see the module.
        seed: of the bootstrap, which resamples within parts.

    Raises:
        InputError: fewer than two images for each part, or logits that are not finite.
    """
    count = len(logits_NC)
    if splits < 1 or count < 2 * splits:
        raise InputError(
            f"IS in {splits} parts needs at least {2 * max(splits, 1)} images, not {count}; pass --splits 1"
        )
    if not np.isfinite(logits_NC).all():
        raise InputError("Inception's logits are not finite; the weights are damaged")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    generator = np.random.default_rng(seed)
    scores, resampled_R = [], np.zeros(RESAMPLES)
    for i in range(splits):
        part_NC = logits_NC[order[i * count // splits : (i + 1) * count // splits]].astype(np.float64)
        log_NC = part_NC - part_NC.max(axis=1, keepdims=True)
        log_NC -= np.log(np.exp(log_NC).sum(axis=1, keepdims=True))
        p_NC = np.exp(log_NC)
        ones = np.ones((1, len(p_NC)))
        scores.append(float(_scores(ones, p_NC, log_NC)[0]))
        chances = np.full(len(p_NC), 1 / len(p_NC))
        resampled_R += _scores(generator.multinomial(len(p_NC), chances, RESAMPLES), p_NC, log_NC) / splits
    value, spread = float(np.mean(scores)), Z_95 * float(np.std(resampled_R, ddof=1))
    # 1 is the least there is: all images alike.
    return InceptionScore(value, float(np.std(scores)), max(value - spread, 1.0), value + spread, splits, count)


def _scores(counts_RN: np.ndarray, p_NC: np.ndarray, log_NC: np.ndarray) -> np.ndarray:
    """exp(mean Σ p log p − Σ q log q) (R,), where image i counts `counts_RN[:, i]` times and q is the mean of p."""
    share_RN = counts_RN / len(p_NC)
    q_RC = share_RN @ p_NC
    own_R = share_RN @ (p_NC * log_NC).sum(axis=1)
    marginal_R = (q_RC * np.log(np.where(q_RC > 0, q_RC, 1))).sum(axis=1)
    return np.exp(own_R - marginal_R)
