"""The VAR transformer (VAR §3.1; block of DiT-style adaptive layer norm, §3.3 "implementation details").

Written for export: no state, no randomness, no flags. State-dict layout of the published ``var_d*.pth``.
Legend: B rows (images, doubled under guidance), L tokens, D width, H heads, Q head width, V codes, Z latent channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.var.config import VARConfig

MAX_SCALE_MUL = math.log(100)  # the learned attention temperature is exp(min(scale_mul, ln 100))
NORMALIZE_EPS = 1e-12  # torch.nn.functional.normalize: keeps an all-zero head from dividing by zero


def _normalize(x_BHLQ: Tensor) -> Tensor:
    """Unit length along the last axis; as `F.normalize`, without the full-size expansion that it exports."""
    return x_BHLQ / x_BHLQ.norm(dim=-1, keepdim=True).clamp_min(NORMALIZE_EPS)


def _rows(modulation_BX: Tensor, width: int) -> list[Tensor]:
    """Split (B, n·D) into n tensors (B, 1, D)."""
    modulation_B1X = modulation_BX[:, None]
    return [modulation_B1X[..., i : i + width] for i in range(0, modulation_BX.shape[1], width)]


class SelfAttention(nn.Module):
    """Cosine attention with a learned temperature per head; the key has no bias."""

    zero_k_bias: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.l2_norm = config.attn_l2_norm
        self.scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(width // self.heads)
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, self.heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_BLD: Tensor, past_BHPQ: tuple[Tensor, Tensor] | None, mask_LL: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend over the past (keys, values) and the new tokens; returns (out, keys, values), past included.

        `mask_LL` is added to the scores; without it every token sees all others (one scale at a time).
        """
        rows, length, width = x_BLD.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv_BL3HQ = F.linear(x_BLD, self.mat_qkv.weight, bias).view(rows, length, 3, self.heads, -1)
        q_BHLQ = qkv_BL3HQ[:, :, 0].transpose(1, 2)
        k_BHLQ = qkv_BL3HQ[:, :, 1].transpose(1, 2)
        v_BHLQ = qkv_BL3HQ[:, :, 2].transpose(1, 2)
        if self.l2_norm:
            q_BHLQ = _normalize(q_BHLQ) * self.scale_mul_1H11.clamp_max(MAX_SCALE_MUL).exp()
            k_BHLQ = _normalize(k_BHLQ)
        if past_BHPQ is not None:
            k_BHLQ = torch.cat((past_BHPQ[0], k_BHLQ), dim=2)
            v_BHLQ = torch.cat((past_BHPQ[1], v_BHLQ), dim=2)
        out = F.scaled_dot_product_attention(q_BHLQ, k_BHLQ, v_BHLQ, attn_mask=mask_LL, scale=self.scale)
        return self.proj(out.transpose(1, 2).reshape(rows, length, width)), k_BHLQ, v_BHLQ


class FFN(nn.Module):
    """Two linear layers with GELU (tanh form)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        return self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh"))


class Block(nn.Module):
    """Attention and FFN, each modulated by the condition (γ gates, scale and shift after the norm)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        width = config.width
        self.eps = config.norm_eps
        self.attn = SelfAttention(config)
        self.ffn = FFN(width, round(width * config.mlp_ratio))
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x_BLD: Tensor,
        condition: Tensor,
        past_key: Tensor | None = None,
        past_value: Tensor | None = None,
        mask_LL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block; `condition` is (B, D), or (B, 1, 6, D) from the shared projection.

        Keys and values are (B, H, P, Q). Returns (x, keys, values), the last two grown by the L new tokens.
        """
        past = None if past_key is None or past_value is None else (past_key, past_value)
        width = x_BLD.shape[-1]
        shared = hasattr(self, "ada_gss")
        rows_BX = (self.ada_gss + condition).flatten(1) if shared else self.ada_lin(condition)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = _rows(rows_BX, width)
        normed = F.layer_norm(x_BLD, (width,), eps=self.eps)
        attended, keys, values = self.attn(normed * (scale1 + 1) + shift1, past, mask_LL)
        x_BLD = x_BLD + attended * gamma1
        normed = F.layer_norm(x_BLD, (width,), eps=self.eps)
        return x_BLD + self.ffn(normed * (scale2 + 1) + shift2) * gamma2, keys, values


class HeadNorm(nn.Module):
    """The modulated norm before the head."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        width = x_BLD.shape[-1]
        scale, shift = _rows(self.ada_lin(condition_BD), width)
        return F.layer_norm(x_BLD, (width,), eps=self.eps) * (scale + 1) + shift


class VAR(nn.Module):
    """Class-conditional next-scale transformer; class number `num_classes` is the null class of guidance."""

    lvl_1L: Tensor  # noqa: N815  the name in the published files
    attn_bias_for_masking: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        width, length = config.width, config.length
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, length, width))
        level_L = torch.cat([torch.full((n,), i) for i, n in enumerate(config.tokens_per_scale)])
        self.register_buffer("lvl_1L", level_L[None])
        blocked = level_L[:, None] < level_L[None, :]
        self.register_buffer("attn_bias_for_masking", torch.where(blocked, -torch.inf, 0.0)[None, None])
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(len(config.scales), width)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width, config.norm_eps)
        self.head = nn.Linear(width, config.vocab_size)

    def condition(self, class_BD: Tensor) -> Tensor:
        """What the blocks are modulated by."""
        if not hasattr(self, "shared_ada_lin"):
            return class_BD
        return self.shared_ada_lin(class_BD).view(-1, 1, 6, class_BD.shape[-1])

    def forward(self, label_B: Tensor, maps_BLZ: Tensor) -> Tensor:
        """Teacher forcing: labels (B,) and maps (B, L − 1, Z) of `Quantizer.teacher_forcing_input` → logits (B, L, V).

        A token sees its own scale and all coarser ones.
        """
        class_BD = self.class_emb(label_B)
        x_BLD = torch.cat((class_BD[:, None] + self.pos_start, self.word_embed(maps_BLZ)), dim=1)
        x_BLD = x_BLD + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        condition = self.condition(class_BD)
        for block in self.blocks:
            x_BLD, _, _ = block(x_BLD, condition, mask_LL=self.attn_bias_for_masking)
        return self.head(self.head_nm(x_BLD, class_BD))
