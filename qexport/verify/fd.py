"""FD: the Fréchet distance between features of generated and of real images, with a bootstrap confidence interval.

    FD = ‖μ − μ_r‖² + tr(C + C_r − 2 (C C_r)^½)

The feature extractor and the real statistics come with the model (`qexport.family.FeatureExtractor`); its name is part
of the figure's. It is FID only where that extractor is Inception, and is never called so here.

FD from n images is biased upwards (C has n − 1 degrees of freedom), so figures with different n are not comparable; n
is always stated. Resampled images repeat each other, which adds to that bias: the interval is therefore the spread of
the bootstrap around *its own* mean, laid around the estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qexport.errors import InputError
from qexport.family import FeatureExtractor
from qexport.numerics.metrics import frechet_distance

RESAMPLES = 50
"""Bootstrap resamples. The standard error of the interval's ends is a tenth of its width."""

Z_95 = 1.96
"""A normal distribution has 95 % of its mass within ± 1.96 standard deviations."""


@dataclass(frozen=True)
class FrechetResult:
    """`value` with the 95 % interval `low` … `high`, over `images` generated with `seed`; `name` of the features."""

    name: str
    value: float
    low: float
    high: float
    images: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "value": self.value,
            "ci95": [self.low, self.high],
            "n": self.images,
            "seed": self.seed,
        }


def measure_fd(batches: Iterable[np.ndarray], extractor: FeatureExtractor, seed: int) -> FrechetResult:
    """FD of generated images against the extractor's real statistics.

    Args:
        batches: images (b, 3, H, W) float32 in [0, 1].
        extractor: gives the features.
        seed: that the images were generated with; the bootstrap uses it too.

    Raises:
        InputError: fewer than two images.
    """
    features = np.concatenate([_features(extractor, images) for images in batches])
    if len(features) < 2:
        raise InputError(f"FD of {len(features)} images; at least 2 are needed")
    value = _distance(features, extractor)
    generator = np.random.default_rng(seed)
    resampled = [
        _distance(features[generator.integers(0, len(features), len(features))], extractor) for _ in range(RESAMPLES)
    ]
    spread = Z_95 * float(np.std(resampled, ddof=1))
    return FrechetResult(extractor.name, value, max(value - spread, 0.0), value + spread, len(features), seed)


@torch.no_grad()
def _features(extractor: FeatureExtractor, images: np.ndarray) -> np.ndarray:
    return extractor.features(torch.from_numpy(np.ascontiguousarray(images))).numpy().astype(np.float64)


def _distance(features: np.ndarray, extractor: FeatureExtractor) -> float:
    return frechet_distance(features.mean(axis=0), np.cov(features, rowvar=False), extractor.mu, extractor.cov)
