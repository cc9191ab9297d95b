"""FD: the Fréchet distance between features of generated and of real images, with a bootstrap confidence interval.

    FD = ‖μ − μ_r‖² + tr(C + C_r − 2 (C C_r)^½)                                        (Heusel et al. 2017)

The last trace is needed of every resample and had in a cheaper way than by a root of matrices: C = XᵀX / (n − 1) with
centred X (n, D), so C C_r has the eigenvalues, but for zeros, of X C_r Xᵀ / (n − 1), (n, n). That matrix is made once,
and a resample picks rows and columns of it. Beyond D images C_r^½ C C_r^½ (D, D) is smaller.

The feature extractor and the real statistics come with the model (`qexport.family.FeatureExtractor`); its name is part
of the figure's. It is FID where that extractor is Inception (`qexport.verify.inception`), and is called so only there.

FD from n images is biased upwards (C has n − 1 degrees of freedom), so figures with different n are not comparable; n
is always stated. Resampled images repeat each other, which adds to that bias: the interval is therefore the spread of
the bootstrap around *its own* mean, laid around the estimate.

Legend: N images, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qexport.errors import InputError
from qexport.family import INCEPTION, FeatureExtractor
from qexport.verify.statistics import Statistics

RESAMPLES = 50
"""Bootstrap resamples. The standard error of the interval's ends is a tenth of its width."""

Z_95 = 1.96
"""A normal distribution has 95 % of its mass within ± 1.96 standard deviations."""


CHUNK = 4096
"""Images whose features are turned to float64 at a time: 64 MiB."""

INDEFINITE_TOLERANCE = 1e-6
"""How far below zero, relative to the greatest, an eigenvalue may lie that stands for zero; features are float32."""


@dataclass(frozen=True)
class FrechetResult:
    """`value` with the 95 % interval `low` … `high`, over `images` generated with `seed`; `name` of the features."""

    name: str
    value: float
    low: float
    high: float
    images: int
    seed: int

    @property
    def label(self) -> str:
        """What the figure is called: ``FID``, or ``FD (NAME)``."""
        return "FID" if self.name == INCEPTION else f"FD ({self.name})"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "label": self.label,
            "value": self.value,
            "ci95": [self.low, self.high],
            "n": self.images,
            "seed": self.seed,
        }


def measure_fd(
    batches: Iterable[np.ndarray], extractor: FeatureExtractor, seed: int, device: str | torch.device = "cpu"
) -> FrechetResult:
    """FD of generated images against the extractor's real statistics.

    Args:
        batches: images (b, 3, H, W) float32 in [0, 1].
        extractor: gives the features.
        seed: that the images were generated with; the bootstrap uses it too.
        device: where the extractor is given the images.

    Raises:
        InputError: see `frechet`.
    """
    features_ND = np.concatenate([_features(extractor, images, device) for images in batches])
    real = Statistics(extractor.mu, extractor.cov, None, extractor.name)
    return frechet(features_ND, real, extractor.name, seed)


@torch.no_grad()
def _features(extractor: FeatureExtractor, images: np.ndarray, device: str | torch.device) -> np.ndarray:
    return extractor.features(torch.from_numpy(np.ascontiguousarray(images)).to(device)).cpu().numpy()


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
        raise InputError(f"features of the generated images ({name}) are not finite")
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
