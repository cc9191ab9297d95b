"""VAR's multi-scale residual VQVAE (VAR §3.2, algorithms 1 and 2; convolutional body of VQGAN, Esser et al. 2021).

State-dict layout of the published ``vae_ch160v4096z32.pth``.
Legend: B batch, C channels, H W map sides, S scales, L tokens of all scales, Z latent channels, V codes.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.conv_blocks import Downsample, ResnetBlock, Upsample, norm
from qexport_models.var.config import VQVAEConfig
from qexport_models.var.resize import area_down_1d, bicubic_up_1d, plane


class AttnBlock(nn.Module):
    """Single-head attention over the positions of a map, (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        c = self.channels
        qkv_B3CN = self.qkv(self.norm(x_BCHW)).flatten(2)
        q_BNC = qkv_B3CN[:, :c].transpose(1, 2) * c**-0.5
        weights_BNN = torch.softmax(q_BNC @ qkv_B3CN[:, c : 2 * c], dim=-1)
        h_BCN = qkv_B3CN[:, 2 * c :] @ weights_BNN.transpose(1, 2)
        return x_BCHW + self.proj_out(h_BCN.reshape(x_BCHW.shape))


class Mid(nn.Module):
    """Residual, attention, residual, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where `attention`.

    The encoder or decoder adds the resample, under the name that the published files have.
    """

    downsample: Downsample
    upsample: Upsample

    def __init__(self, channels: list[int], attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(channels))
        self.attn = nn.ModuleList(AttnBlock(c) for c in channels[1:]) if attention else nn.ModuleList()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return x_BCHW


class Encoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → features (B, Z, H/f, W/f)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.ch
        for i, width in enumerate(widths):
            level = Level([before] + [width] * config.num_res_blocks, attention=i == last)
            if i != last:
                level.downsample = Downsample(width)
            self.down.append(level)
            before = width
        self.mid = Mid(before)
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, config.z_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See class."""
        h = self.conv_in(x_BCHW)
        for i, level in enumerate(cast(list[Level], list(self.down))):
            h = level(h)
            if i != len(self.down) - 1:
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features (B, Z, H, W) → images (B, 3, H·f, W·f), not clamped."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        levels: list[Level] = []
        before = widths[-1]
        for i in reversed(range(len(widths))):
            level = Level([before] + [widths[i]] * (config.num_res_blocks + 1), attention=i == last)
            if i != 0:
                level.upsample = Upsample(widths[i])
            levels.insert(0, level)
            before = widths[i]
        self.up = nn.ModuleList(levels)
        self.norm_out = norm(before)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, x_BZHW: Tensor) -> Tensor:
        """See class."""
        h = self.mid(self.conv_in(x_BZHW))
        for i, level in reversed(list(enumerate(cast(list[Level], list(self.up))))):
            h = level(h)
            if i != 0:
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class QuantResi(nn.Module):
    """The φ convolutions: φ(h) = (1 − r)·h + r·conv(h), shared between neighbouring scales (VAR algorithm 1)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        z = config.z_channels
        self.ratio = config.quant_resi
        self.qresi_ls = nn.ModuleList(nn.Conv2d(z, z, 3, padding=1) for _ in range(config.share_quant_resi))

    def forward(self, h_BZHW: Tensor, index: int) -> Tensor:
        """φ number `index` on (B, Z, H, W)."""
        return h_BZHW * (1 - self.ratio) + self.qresi_ls[index](h_BZHW) * self.ratio


@cache
def _up(source: int, target: int) -> np.ndarray:
    return plane(bicubic_up_1d(source, target))


@cache
def _down(source: int, target: int) -> np.ndarray:
    return plane(area_down_1d(source, target))


class Quantizer(nn.Module):
    """Codebook, φ convolutions and the resizes between scales."""

    ema_vocab_hit_SV: Tensor  # noqa: N815 - a key of the published files

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = QuantResi(config)
        # Training statistics of the published files; read and written strictly, never used.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.scales), config.vocab_size))

    def contribution(self, tokens_BL: Tensor, scale: int) -> Tensor:
        """What the tokens (B, side²) of one scale add to f_hat: (B, Z, H, W)."""
        side, full = self.config.scales[scale], self.config.scales[-1]
        up = torch.from_numpy(_up(side, full)).to(self.embedding.weight)
        h_BZ = (up @ self.embedding(tokens_BL)).transpose(1, 2)
        return self.quant_resi(h_BZ.reshape(-1, h_BZ.shape[1], full, full), self.config.phi_index[scale])

    def shrink(self, f_BZHW: Tensor, scale: int) -> Tensor:
        """Area-resize a map to the side of `scale`: (B, side², Z)."""
        side, full = self.config.scales[scale], self.config.scales[-1]
        down = torch.from_numpy(_down(full, side)).to(f_BZHW)
        return down @ f_BZHW.flatten(2).transpose(1, 2)

    def tokenize(self, f_BZHW: Tensor) -> list[Tensor]:
        """Features → nearest code of the remaining residual, scale by scale: S tensors (B, side²) int64."""
        rest, tokens = f_BZHW, []
        codes_VZ = self.embedding.weight
        for scale in range(len(self.config.scales)):
            z_BLZ = self.shrink(rest, scale)
            distance_BLV = codes_VZ.square().sum(1) - 2 * z_BLZ @ codes_VZ.T
            tokens.append(distance_BLV.argmin(-1))
            rest = rest - self.contribution(tokens[-1], scale)
        return tokens

    def f_hats(self, tokens: list[Tensor]) -> list[Tensor]:
        """The accumulated feature map (B, Z, H, W) after each scale."""
        total, out = torch.zeros((), device=tokens[0].device), []
        for scale, tokens_BL in enumerate(tokens):
            total = total + self.contribution(tokens_BL, scale)
            out.append(total)
        return out

    def teacher_forcing_input(self, tokens: list[Tensor]) -> Tensor:
        """What the transformer reads at every position but the first: (B, L − 1, Z)."""
        maps = self.f_hats(tokens[:-1])
        return torch.cat([self.shrink(f, scale + 1) for scale, f in enumerate(maps)], dim=1)


class VQVAE(nn.Module):
    """Encoder, quantiser, decoder. Images (B, 3, side, side) in [−1, 1]."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.z_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(z, z, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z, z, 3, padding=1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images → continuous features (B, Z, H, W)."""
        return self.quant_conv(self.encoder(images_BCHW))

    def tokenize(self, images_BCHW: Tensor) -> list[Tensor]:
        """Images → tokens of each scale."""
        return self.quantize.tokenize(self.encode(images_BCHW))

    def decode(self, f_hat_BZHW: Tensor) -> Tensor:
        """f_hat → images clamped to [−1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat_BZHW)).clamp(-1, 1)
