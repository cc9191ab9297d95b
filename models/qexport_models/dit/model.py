"""The diffusion transformer with adaLN-Zero conditioning (arXiv:2212.09748, section 3.2, figure 3).

Attribute names are those of the published state dicts. The module holds no state, draws nothing and never branches on
a value, so that one graph with a free batch dimension is the whole model.

B batch, C channels, H W latent side, T tokens, D hidden size, N heads, K head width, P patch side, G grid side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.dit.config import DiTConfig
from qexport_models.dit.embed import LabelEmbedder, PatchEmbed, TimestepEmbedder, position_table

NORM_EPS = 1e-6
"""Of every layer norm; none has parameters, adaLN supplies scale and shift."""

GUIDED_CHANNELS = 3
"""The published models guide the first three latent channels only."""


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Layer norm without parameters, then x·(1 + scale) + shift, both from the condition: (B, T, D)."""
    normed_BTD = F.layer_norm(x_BTD, (x_BTD.shape[-1],), eps=NORM_EPS)
    return normed_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Attention(nn.Module):
    """Multi-head self-attention without mask: softmax(q kᵀ / √K) v. Rows of `qkv` are q, k, v, each head by head."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.hidden_size = config.hidden_size
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        width = self.hidden_size
        qkv_BTE = self.qkv(x_BTD)
        q_BNTK = self._heads(qkv_BTE[..., :width])
        k_BNTK = self._heads(qkv_BTE[..., width : 2 * width])
        v_BNTK = self._heads(qkv_BTE[..., 2 * width :])
        mixed_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        return self.proj(mixed_BNTK.transpose(1, 2).flatten(2))

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, GELU in its tanh form, Linear."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(x_BTD), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition (adaLN-Zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.attn = Attention(config)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        """Tokens (B, T, D) and condition (B, D) → tokens. Modulation: shift, scale, gate of attention, then of MLP."""
        width = self.hidden_size
        mod_BE = self.adaLN_modulation(c_BD)
        shift1_BD, scale1_BD, gate1_BD, shift2_BD, scale2_BD, gate2_BD = (
            mod_BE[:, i * width : (i + 1) * width] for i in range(6)
        )
        x_BTD = x_BTD + gate1_BD[:, None] * self.attn(modulate(x_BTD, shift1_BD, scale1_BD))
        return x_BTD + gate2_BD[:, None] * self.mlp(modulate(x_BTD, shift2_BD, scale2_BD))


class FinalLayer(nn.Module):
    """Modulated layer norm and the projection of each token to its patch of every output channel."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        """Tokens (B, T, D) and condition (B, D) → (B, T, P·P·C), a patch's pixels before its channels."""
        mod_BE = self.adaLN_modulation(c_BD)
        return self.linear(modulate(x_BTD, mod_BE[:, : self.hidden_size], mod_BE[:, self.hidden_size :]))


class DiT(nn.Module):
    """A diffusion transformer: noisy latent, timestep and class → noise, and variance if it is learned."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.frequency_denominator)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        positions_TD = torch.from_numpy(position_table(config.hidden_size, config.grid_size))
        self.pos_embed = nn.Parameter(positions_TD[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """One evaluation, without guidance.

        Args:
            x_BCHW: noisy latents (B, in_channels, input_size, input_size), in the dtype of the weights.
            t_B: original timesteps 0 … 999, (B,) or, where all are the same, (1,); any real dtype.
            y_B: labels (B,) int64; `config.null_class` means none.

        Returns:
            (B, out_channels, input_size, input_size): the noise ε, then the variance coordinate v ∈ about [−1, 1].
        """
        x_BTD = self.x_embedder(x_BCHW) + self.pos_embed
        c_BD = self.t_embedder(t_B, x_BTD.dtype) + self.y_embedder(y_B)
        for block in self.blocks:
            x_BTD = block(x_BTD, c_BD)
        return unpatchify(self.final_layer(x_BTD, c_BD), self.config)

    def forward_with_cfg(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor,
        cfg_scale: float | Tensor,
        guided_channels: int = GUIDED_CHANNELS,
    ) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598) on a batch of 2N: conditional half first, null class second.

        The latents of the second half are not read: both halves see those of the first. On the first
        `guided_channels` channels both halves get uncond + cfg_scale·(cond − uncond); the others stay as they are.

        Returns:
            (2N, out_channels, input_size, input_size).
        """
        half_NCHW = x_BCHW[: x_BCHW.shape[0] // 2]
        out_2NCHW = self(torch.cat([half_NCHW, half_NCHW]), t_B, y_B).unflatten(0, (2, -1))
        guided_NGHW = guide(out_2NCHW[0], out_2NCHW[1], cfg_scale, guided_channels)[:, :guided_channels]
        both_2NGHW = torch.stack([guided_NGHW, guided_NGHW])
        return torch.cat([both_2NGHW, out_2NCHW[:, :, guided_channels:]], dim=2).flatten(0, 1)


def unpatchify(x_BTE: Tensor, config: DiTConfig) -> Tensor:
    """Patches (B, T, P·P·C) → image (B, C, G·P, G·P)."""
    grid, patch, channels = config.grid_size, config.patch_size, config.out_channels
    x_BGGPPC = x_BTE.reshape(-1, grid, grid, patch, patch, channels)
    return x_BGGPPC.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)


def guide(cond_BCHW: Tensor, uncond_BCHW: Tensor, cfg_scale: float | Tensor, guided_channels: int) -> Tensor:
    """uncond + cfg_scale·(cond − uncond) on the first `guided_channels` channels, cond on the others."""
    uncond_BGHW = uncond_BCHW[:, :guided_channels]
    guided_BGHW = uncond_BGHW + cfg_scale * (cond_BCHW[:, :guided_channels] - uncond_BGHW)
    return torch.cat([guided_BGHW, cond_BCHW[:, guided_channels:]], dim=1)
