"""What a DiT knows before its first block: where, when and which class.

B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qexport_models.dit.config import FREQUENCIES

MAX_PERIOD = 10000.0
"""Base of both sinusoidal codes (arXiv:1706.03762, section 3.5)."""


def timestep_frequencies(denominator: int) -> list[float]:
    """10000^(−i/denominator) for i = 0 … 127.

    In float32 by torch's exp, as in training: times t = 999, one unit in the last place (NumPy's exp differs by it)
    already moves the embedding by 9e-6.
    """
    i_F = torch.arange(FREQUENCIES, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(MAX_PERIOD) * i_F / denominator).tolist()


def position_table(hidden_size: int, grid_size: int) -> NDArray[np.float32]:
    """Fixed 2-D sine-cosine code of the token grid, (grid², hidden_size), float32.

    The first half of the channels encodes the column, the second half the row; each half holds sines, then cosines, of
    the coordinate times 10000^(−k/(hidden_size/4)). Computed in float64, rounded once.
    """
    quarter = hidden_size // 4
    omega = MAX_PERIOD ** (-np.arange(quarter, dtype=np.float64) / quarter)
    angle_GK = np.arange(grid_size, dtype=np.float64)[:, None] * omega
    code_GH = np.concatenate([np.sin(angle_GK), np.cos(angle_GK)], axis=1)
    column_THh = np.tile(code_GH, (grid_size, 1))
    row_THh = np.repeat(code_GH, grid_size, axis=0)
    return np.concatenate([column_THh, row_THh], axis=1).astype(np.float32)


class PatchEmbed(nn.Module):
    """Cuts the latent into square patches and projects each: (B, C, H, W) → (B, T, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Latent, H and W multiples of the patch size → tokens (B, T, D)."""
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timestep (B,) → (B, D): cosines, then sines, of t·frequency, through Linear, SiLU, Linear.

    The features are float32 whatever the weights are: t·frequency reaches 999, where float16 has no fraction left.
    The frequencies are no buffer, for `.half()` would round a buffer.
    """

    def __init__(self, hidden_size: int, frequency_denominator: int) -> None:
        super().__init__()
        self.frequencies = timestep_frequencies(frequency_denominator)
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t_B: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Timesteps (B,), any real dtype → (B, D) in `dtype`, that of the weights."""
        frequencies_F = torch.tensor(self.frequencies, dtype=torch.float32, device=t_B.device)
        angle_BF = t_B.to(torch.float32)[:, None] * frequencies_F
        return self.mlp(torch.cat([torch.cos(angle_BF), torch.sin(angle_BF)], dim=1).to(dtype))


class LabelEmbedder(nn.Module):
    """Class label (B,) int64 → (B, D). The last row is the null class; labels are never dropped here."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y_B: Tensor) -> Tensor:
        """Labels 0 … num_classes, the last meaning none → (B, D)."""
        return self.embedding_table(y_B)
