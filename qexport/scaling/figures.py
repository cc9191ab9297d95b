"""What a run is judged by: each figure, how it is put together from images, and its bootstrap interval.

A figure is a function of sums over images, so that drawing images with replacement gives its spread. Runs that are
judged on the same images are resampled together: then the spread of a difference is that of the difference.

Legend: N images, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES = 1000
"""The ends of a 95 % interval are then good to about 7 % of its half-width."""

MOST_KEPT = 8
"""Draws that are kept; a law asks a thousand times for the same few, 4 MB each of 500 images."""

TAIL = 2.5
"""Per cent of resamples beyond each end."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Figure:
    """`columns` are the arrays (N,) that it needs; `combine` makes it of their means, elementwise."""

    name: str
    label: str
    columns: tuple[str, ...]
    combine: Callable[..., Any] = lambda mean: mean
    rising: bool = False


def _ratio(error: Any, power: Any) -> Any:
    return error / power


def _root(error: Any, power: Any) -> Any:
    return np.sqrt(error / power)


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("kl", "KL to full precision, nats per token", ("kl",)),
        Figure("top1_agreement", "top-1 agreement with full precision", ("top1_agreement",), rising=True),
        Figure("cross_entropy", "cross-entropy on real tokens, nats", ("cross_entropy",)),
        Figure("cross_entropy_fp", "cross-entropy on real tokens, full precision, nats", ("cross_entropy_fp",)),
        Figure("cross_entropy_drawn", "cross-entropy on the full model's samples, nats", ("cross_entropy",)),
        Figure("output_mse", "output error, relative", ("output_error", "output_power"), _ratio),
        Figure("loss", "DDPM loss", ("loss",)),
        Figure("loss_fp", "DDPM loss, full precision", ("loss_fp",)),
        Figure("trajectory_error", "trajectory error, relative L2", ("trajectory_error", "trajectory_power"), _root),
    )
}  # fmt: skip
"""Every figure that is made of images; FD is not, and brings its own interval (`qexport.verify.fd`)."""

FD = "fd"
FD_LABEL = "FD"


def label_of(name: str) -> str:
    """What to write beside an axis."""
    return FIGURES[name].label if name in FIGURES else FD_LABEL


@lru_cache(maxsize=MOST_KEPT)
def draws(images: int, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each image counts in each resample, (R, N) float64, read-only; rows sum to N. Equal arguments, equal
    draws.
    """
    chances = np.full(images, 1 / images)
    counts_RN = np.random.default_rng(seed).multinomial(images, chances, size=resamples).astype(np.float64)
    counts_RN.flags.writeable = False  # one array for all who ask
    return counts_RN


def value_of(figure: Figure, arrays: Arrays) -> float:
    """The figure over all images."""
    return float(figure.combine(*(arrays[name].mean() for name in figure.columns)))


def resampled(figure: Figure, arrays: Arrays, counts_RN: np.ndarray) -> np.ndarray:
    """The figure in each resample (R,)."""
    images = counts_RN.shape[1]
    return np.asarray(figure.combine(*(counts_RN @ arrays[name] / images for name in figure.columns)))


def interval(samples_R: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resamples."""
    low, high = np.percentile(samples_R, [TAIL, 100 - TAIL])
    return float(low), float(high)


def summarise(name: str, arrays: Arrays, seed: int = 0) -> dict[str, Any]:
    """``value``, ``ci95`` and ``n`` of a figure."""
    figure = FIGURES[name]
    images = len(arrays[figure.columns[0]])
    low, high = interval(resampled(figure, arrays, draws(images, seed)))
    return {"value": value_of(figure, arrays), "ci95": [low, high], "n": images}
