"""Sizes of VAR and of its VQVAE."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True)
class VQVAEConfig:
    """Multi-scale residual VQVAE: `vocab_size` codes of `z_channels` numbers, feature maps `ch · ch_mult[i]` wide.

    `scales` are the sides of the token maps, coarse to fine; `quant_resi` is the share that the φ convolutions take;
    `share_quant_resi` of them are spread over the scales.
    """

    vocab_size: int
    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    scales: tuple[int, ...]
    num_res_blocks: int = 2
    share_quant_resi: int = 4
    quant_resi: float = 0.5

    @property
    def downsample(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def phi_index(self) -> tuple[int, ...]:
        """Which φ convolution each scale uses: the nearest of evenly spread ticks, in float64 as the original does.

        For ten scales, 2 and 7 lie exactly between two ticks and are decided by the rounding of these very operations.
        """
        k = self.share_quant_resi
        margin = 1 / 3 / k if k == 4 else 1 / 2 / k
        ticks = np.linspace(margin, 1 - margin, k)
        last = len(self.scales) - 1
        return tuple(int(np.argmin(np.abs(ticks - i / last))) for i in range(len(self.scales)))


@dataclass(frozen=True)
class VARConfig:
    """The transformer: `depth` blocks of `width` with `heads` heads over `num_classes` + 1 (null) classes."""

    depth: int
    width: int
    heads: int
    num_classes: int
    scales: tuple[int, ...]
    vocab_size: int
    z_channels: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    shared_aln: bool = False
    attn_l2_norm: bool = True

    @property
    def tokens_per_scale(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.scales)

    @property
    def length(self) -> int:
        """Tokens of an image, L."""
        return sum(self.tokens_per_scale)

    @property
    def first_token(self) -> tuple[int, ...]:
        """Index of each scale's first token."""
        return (0, *accumulate(self.tokens_per_scale))[:-1]
