"""LlamaGen's VQ tokeniser in the state-dict layout of the published ``vq_ds16_c2i.pt`` and ``vq_ds8_c2i.pt``.

The convolutional body of VQGAN (Esser et al. 2021) around a codebook of unit vectors of eight numbers (ViT-VQGAN, Yu et
al. 2022): features and codes are normalised, so the nearest code is the one of largest cosine.

Legend: B batch, C channels, H W map sides, N = H · W positions, Z feature channels, E code width, K codes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.conv_blocks import NORM_EPS, NORM_GROUPS, Downsample, ResnetBlock, Upsample
from qexport_models.llamagen.config import VQConfig

USAGE_SLOTS = 65536
"""Length of `codebook_used`, a training statistic that the published files carry along."""


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class AttnBlock(nn.Module):
    """Single-head attention over the positions of a map, (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        h = self.norm(x_BCHW)
        q_B1NC, k_B1NC, v_B1NC = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        out_BCN = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC).squeeze(1).transpose(1, 2)
        return x_BCHW + self.proj_out(out_BCN.reshape(x_BCHW.shape))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where `attention`, then a resample if any."""

    def __init__(self, channels: list[int], attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(AttnBlock(c) for c in channels[1:] if attention)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H', W')."""
        for i, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return self.resample(x_BCHW)

    def resample(self, x_BCHW: Tensor) -> Tensor:
        """Nothing, at the last level."""
        return x_BCHW


class DownLevel(Level):
    """A level that ends at half its resolution."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__(channels, attention=False)
        self.downsample = Downsample(channels[-1])

    def resample(self, x_BCHW: Tensor) -> Tensor:
        """Halve both sides."""
        return self.downsample(x_BCHW)


class UpLevel(Level):
    """A level that ends at twice its resolution."""

    def __init__(self, channels: list[int], attention: bool) -> None:
        super().__init__(channels, attention)
        self.upsample = Upsample(channels[-1])

    def resample(self, x_BCHW: Tensor) -> Tensor:
        """Double both sides."""
        return self.upsample(x_BCHW)


def _middle(channels: int) -> nn.Sequential:
    return nn.Sequential(ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels))


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → features (B, Z, H/f, W/f)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        inputs = [config.ch, *widths[:-1]]
        runs = [[a] + [b] * config.num_res_blocks for a, b in zip(inputs, widths, strict=True)]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.Sequential(*(DownLevel(run) for run in runs[:-1]), Level(runs[-1], attention=True))
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        h = self.mid(self.conv_blocks(self.conv_in(x_BCHW)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features (B, Z, H, W) → images (B, 3, H·f, W·f), nominally in [−1, 1], not clamped."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        inputs = [widths[0], *widths[:-1]]
        runs = [[a] + [b] * (config.num_res_blocks + 1) for a, b in zip(inputs, widths, strict=True)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        rising = (UpLevel(run, attention=i == 0) for i, run in enumerate(runs[:-1]))
        self.conv_blocks = nn.Sequential(*rising, Level(runs[-1], attention=len(runs) == 1))
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x_BZHW: Tensor) -> Tensor:
        """See class."""
        h = self.conv_blocks(self.mid(self.conv_in(x_BZHW)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Codebook(nn.Module):
    """K codes of E numbers, normalised to length 1 whenever they are used."""

    codebook_used: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_width)
        self.register_buffer("codebook_used", torch.zeros(USAGE_SLOTS))

    def nearest(self, h_BEHW: Tensor) -> Tensor:
        """Index of the nearest code at every position: features (B, E, H, W) → int64 (B, N), row by row."""
        h_BNE = F.normalize(h_BEHW.flatten(2).transpose(1, 2), dim=-1)
        return (h_BNE @ F.normalize(self.embedding.weight, dim=-1).T).argmax(-1)

    def look_up(self, tokens_BN: Tensor) -> Tensor:
        """Normalised codes of the tokens: int64 (B, N) → (B, E, N)."""
        return F.normalize(self.embedding(tokens_BN), dim=-1).transpose(1, 2)


class VQ(nn.Module):
    """The tokeniser: images ↔ tokens."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.z_channels, 1)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → tokens (B, N) int64."""
        return self.quantize.nearest(self.quant_conv(self.encoder(image_BCHW * 2 - 1)))
