"""One step of sampling: the `denoise` graph, in three stretches: embed, the blocks, update.

All arithmetic of guidance, DDPM and DDIM is inside; which sampler it is follows from the numbers of the schedule row
(`qexport_models.dit.schedule`), so one graph plays every schedule without control flow.

The published sampler carries a batch of 2N, whose second half gets noise of its own and is thrown away at the end. The
model only ever reads the first half, so that half alone is carried here, and the result is the same.

B batch, Z = 2B (all images with their class, then all without), C latent channels, O output channels, H W latent side,
T tokens, D hidden size, R columns of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexport_models.dit.model import GUIDED_CHANNELS, DiT, guide, unpatchify
from qexport_models.dit.schedule import ROW_COLUMNS

_TIMESTEP = ROW_COLUMNS.index("timestep")


class Embed(nn.Module):
    """What enters the blocks: the latent's tokens, twice, and the condition with and without class."""

    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.null_class = dit.config.null_class
        self.x_embedder, self.t_embedder, self.y_embedder = dit.x_embedder, dit.t_embedder, dit.y_embedder
        self.pos_embed = dit.pos_embed

    def forward(self, label_B: Tensor, x_BCHW: Tensor, row_R: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens (Z, T, D) and conditions (Z, D) in the dtype of the weights."""
        null_B = torch.full_like(label_B, self.null_class)
        # Both halves have the same tokens: embedded once.
        x_BTD = self.x_embedder(x_BCHW.to(self.pos_embed.dtype)) + self.pos_embed
        t_1D = self.t_embedder(row_R[_TIMESTEP : _TIMESTEP + 1], x_BTD.dtype)
        return torch.cat((x_BTD, x_BTD)), t_1D + self.y_embedder(torch.cat((label_B, null_B)))


class Update(nn.Module):
    """From the blocks' output to the guided prediction and the next state.

    State and update are float32 whatever the weights are: x̂₀ is a small difference of terms that are scaled by up to
    1/√ᾱ = 157, and float16 would lose it.
    """

    def __init__(self, dit: DiT, guided_channels: int) -> None:
        super().__init__()
        self.config = dit.config
        self.final_layer = dit.final_layer
        self.guided_channels = guided_channels

    def forward(
        self, x_ZTD: Tensor, c_ZD: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, row_R: Tensor, cfg: Tensor, eta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the next state (B, C, H, W) and the guided output (B, O, H, W); see `DenoiseStep`."""
        row = {name: row_R[i] for i, name in enumerate(ROW_COLUMNS)}
        batch, channels = x_BCHW.shape[:2]
        out_ZOHW = unpatchify(self.final_layer(x_ZTD, c_ZD), self.config).to(torch.float32)
        guided_BOHW = guide(out_ZOHW[:batch], out_ZOHW[batch:], cfg, self.guided_channels)
        eps_BCHW = guided_BOHW[:, :channels]
        x0_BCHW = row["recip"] * x_BCHW - row["recipm1"] * eps_BCHW
        sigma = eta * row["sigma_unit"]
        eps_coef = torch.sqrt(torch.relu(row["eps_variance"] - sigma * sigma))
        mean_BCHW = row["x0_coef"] * x0_BCHW + row["x_coef"] * x_BCHW + eps_coef * eps_BCHW
        # Without a variance output f is zero and the posterior variance remains.
        f_BCHW = (guided_BOHW[:, channels:] + 1) / 2 if self.config.learn_sigma else torch.zeros_like(x_BCHW)
        log_variance_BCHW = f_BCHW * row["max_log_variance"] + (1 - f_BCHW) * row["min_log_variance"]
        deviation_BCHW = row["learned"] * torch.exp(0.5 * log_variance_BCHW) + sigma
        return mean_BCHW + deviation_BCHW * noise_BCHW, guided_BOHW


class DenoiseStep(nn.Module):
    """x_t → x_(t−1) with classifier-free guidance."""

    def __init__(self, dit: DiT, guided_channels: int = GUIDED_CHANNELS) -> None:
        super().__init__()
        self.config = dit.config
        self.embed = Embed(dit)
        self.blocks = dit.blocks
        self.update = Update(dit, guided_channels)

    def forward(
        self, label_B: Tensor, x_BCHW: Tensor, noise_BCHW: Tensor, row_R: Tensor, cfg: Tensor, eta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            label_B: classes (B,) int64.
            x_BCHW: state (B, C, H, W) float32; standard normal before the first step.
            noise_BCHW: standard normal (B, C, H, W) float32; the last step ignores it.
            row_R: the step's row, (len(ROW_COLUMNS),) float32, of `ddpm_rows` or `ddim_rows`.
            cfg: guidance scale, () float32; 1 is the conditional model alone.
            eta: DDIM's η, () float32; DDPM rows ignore it.

        Returns:
            The next state (B, C, H, W) float32, and the guided model output (B, O, H, W) float32.
        """
        x_ZTD, c_ZD = self.embed(label_B, x_BCHW, row_R)
        for block in self.blocks:
            x_ZTD = block(x_ZTD, c_ZD)
        return self.update(x_ZTD, c_ZD, x_BCHW, noise_BCHW, row_R, cfg, eta)
