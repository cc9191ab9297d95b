"""What a model answers so that it can be judged: logits, predictions, features of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class DrawSpec:
    """Where a graph draws tokens: names of the ports that hold what is needed to judge a draw.

    `logits` (batch, tokens, V) are guided but not yet filtered; `uniform` (batch, tokens) is the noise; `tokens`
    (batch, tokens) the outcome; `top_k`, `top_p`, `temperature` the scalar inputs.
    """

    graph: str
    logits: str = "logits"
    tokens: str = "tokens"
    uniform: str = "uniform"
    top_k: str = "top_k"
    top_p: str = "top_p"
    temperature: str = "temperature"


class LogitModel(Protocol):
    """Teacher forcing, for quality figures of language-style models; no guidance, no filtering."""

    def tokenize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, H, W) in [0, 1] → tokens (n, L) int64."""
        ...

    def teacher_forced_logits(self, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Labels (n,) and tokens (n, L), int64 → logits (n, L, V).

        What a gradient reaches may be trained: none may reach a parameter that decides about more than logits, such as
        a codebook whose codes are decoded.
        """
        ...

    @property
    def scale_lengths(self) -> Sequence[int]:
        """Tokens per group for which figures are reported apart (VAR: per scale), summing to L."""
        ...


class DenoiserModel(Protocol):
    """One evaluation of a denoiser, for quality figures of diffusion models; no guidance, no sampler."""

    @property
    def timesteps(self) -> int:
        """Timesteps of training; t lies in 0 … timesteps − 1, the noisiest last."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, H, W) in [0, 1] → latents (n, C, h, w) as the denoiser sees them; nothing is drawn."""
        ...

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Latents and standard normal noise (n, C, h, w), timesteps (n,) int64 → noisy latents (n, C, h, w)."""
        ...

    def denoise(self, noisy: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Noisy latents (n, C, h, w), timesteps and labels (n,) int64 → (n, ≥ C, h, w); the first C are the noise."""
        ...

    def graph_inputs(self, noisy: np.ndarray, t: int, labels: np.ndarray) -> Mapping[str, np.ndarray]:
        """What to feed the denoising graph so that its output is that of `denoise`, all images at the same timestep."""
        ...


@dataclass(frozen=True)
class DenoiseSpec:
    """Where a graph denoises, and the model that it evaluates.

    `state` (batch, C, h, w) is the output port with the next, less noisy latents; `output` (batch, ≥ C, h, w) the one
    with the model's output, guided, its first C channels the noise.
    """

    graph: str
    model: DenoiserModel
    state: str = "next_x"
    output: str = "output"


INCEPTION = "Inception-v3"
"""The features that FID is defined by: those of that network with its published weights."""


class FeatureExtractor(Protocol):
    """The feature space in which the Fréchet distance of generated images is measured, and the real images in it."""

    @property
    def name(self) -> str:
        """What the features are, for reports: ``FD (NAME)``. Only Inception's may be called FID."""
        ...

    @property
    def mu(self) -> np.ndarray:
        """Mean feature of real images, (D,) float64."""
        ...

    @property
    def cov(self) -> np.ndarray:
        """Covariance of the features of real images, (D, D) float64."""
        ...

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, H, W) float32 in [0, 1] → features (n, D) float32."""
        ...
