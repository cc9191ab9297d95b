"""FeatureNet: the classifier in whose features the Fréchet distance on CIFAR-10 is measured.

A ResNet-9 that reaches 91.2 % on CIFAR-10's test images; its features are the 256 channels before the classifier,
averaged over the map. Real test images against real training images score 0.065. It is not Inception, and what it
measures is never called FID.

Legend: B batch, C channels, H W map sides.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from qexport_models.checkpoints import BUNDLED, read_state
from qexport_models.strict_load import build_strict

NAME = "FeatureNet, CIFAR-10"
WEIGHTS = "featurenet.safetensors"
STATISTICS = "featurenet-stats.npz"


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )  # fmt: skip


class Residual(nn.Module):
    """x + two convolutions of x, (B, C, H, W) → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        return x_BCHW + self.body(x_BCHW)


class FeatureNet(nn.Module):
    """RGB images (B, 3, 32, 32) in [−1, 1] → features (B, 256) and logits (B, 10). Evaluation mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 64)
        self.stage1 = nn.Sequential(_conv(64, 128), nn.MaxPool2d(2), Residual(128))
        self.stage2 = nn.Sequential(_conv(128, 256), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(_conv(256, 256), nn.MaxPool2d(2), Residual(256))
        self.fc = nn.Linear(256, 10)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """See class."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x_BCHW))))
        features_BC = x.mean(dim=(2, 3))
        return features_BC, self.fc(features_BC)


class Cifar10Features:
    """FeatureNet and the statistics of the 50,000 training images (`qexport.family.FeatureExtractor`).

    Weights and statistics are read at first use.
    """

    name = NAME

    @property
    def mu(self) -> np.ndarray:
        """Mean feature of the training images, (256,) float64."""
        return _statistics()["train_mu"]

    @property
    def cov(self) -> np.ndarray:
        """Covariance of the training images' features, (256, 256) float64."""
        return _statistics()["train_cov"]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (n, 3, 32, 32) float32 in [0, 1] → features (n, 256) float32, computed where the images lie."""
        return load_featurenet(images.device.type)(images * 2 - 1)[0]


@cache
def load_featurenet(device: str = "cpu") -> FeatureNet:
    """The bundled FeatureNet, loaded strictly, in evaluation mode.

    Raises:
        CheckpointError: the bundled file is damaged.
    """
    return build_strict(FeatureNet, read_state(BUNDLED / WEIGHTS), f"FeatureNet ({WEIGHTS})").to(device)


@cache
def _statistics() -> dict[str, np.ndarray]:
    with np.load(BUNDLED / STATISTICS) as file:
        return {name: file[name] for name in file.files}
