"""Convolutional parts that image autoencoders share, as VQGAN has them (Esser et al. 2021, arXiv 2012.09841).

VAR's VQVAE, LlamaGen's VQ and the KL autoencoder are built of these; parameter names are those of the published files.
Legend: B batch, C channels, H W map sides.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32
NORM_EPS = 1e-6


def norm(channels: int) -> nn.GroupNorm:
    """The group norm that all of them use."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """(B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x_BCHW) + h


class Downsample(nn.Module):
    """Halves both sides: pads right and bottom by one, convolves with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
