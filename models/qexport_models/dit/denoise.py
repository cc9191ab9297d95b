"""One step of sampling: the `denoise` graph.

All arithmetic of guidance, DDPM and DDIM is inside; which sampler it is follows from the numbers of the schedule row
(`qexport_models.dit.schedule`), so one graph plays every schedule without control flow.

B batch, C latent channels, O output channels, H W latent side, R columns of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexport_models.dit.model import GUIDED_CHANNELS, DiT, guide
from qexport_models.dit.schedule import ROW_COLUMNS


class DenoiseStep(nn.Module):
    """x_t → x_(t−1) with classifier-free guidance.

    The published sampler carries a batch of 2N, whose second half gets noise of its own and is thrown away at the end.
    The model only ever reads the first half, so that half alone is carried here, and the result is the same.

    State and update are float32 whatever the weights are: x̂₀ is a small difference of terms that are scaled by up to
    1/√ᾱ = 157, and float16 would lose it.
    """

    def __init__(self, dit: DiT, guided_channels: int = GUIDED_CHANNELS) -> None:
        super().__init__()
        self.dit = dit
        self.guided_channels = guided_channels

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
        row = {name: row_R[i] for i, name in enumerate(ROW_COLUMNS)}
        channels = self.dit.config.in_channels
        guided_BOHW = self._guided(label_B, x_BCHW, row_R[0:1], cfg)
        eps_BCHW = guided_BOHW[:, :channels]
        x0_BCHW = row["recip"] * x_BCHW - row["recipm1"] * eps_BCHW
        sigma = eta * row["sigma_unit"]
        eps_coef = torch.sqrt(torch.relu(row["eps_variance"] - sigma * sigma))
        mean_BCHW = row["x0_coef"] * x0_BCHW + row["x_coef"] * x_BCHW + eps_coef * eps_BCHW
        # Without a variance output f is zero and the posterior variance remains.
        f_BCHW = (guided_BOHW[:, channels:] + 1) / 2 if self.dit.config.learn_sigma else torch.zeros_like(x_BCHW)
        log_variance_BCHW = f_BCHW * row["max_log_variance"] + (1 - f_BCHW) * row["min_log_variance"]
        deviation_BCHW = row["learned"] * torch.exp(0.5 * log_variance_BCHW) + sigma
        return mean_BCHW + deviation_BCHW * noise_BCHW, guided_BOHW

    def _guided(self, label_B: Tensor, x_BCHW: Tensor, t_1: Tensor, cfg: Tensor) -> Tensor:
        """Both evaluations in one batch, conditional first → guided output (B, O, H, W) float32."""
        null_B = torch.full_like(label_B, self.dit.config.null_class)
        x_BCHW = x_BCHW.to(self.dit.pos_embed.dtype)
        out_ZOHW = self.dit(torch.cat([x_BCHW, x_BCHW]), t_1, torch.cat([label_B, null_B]))
        out_2BOHW = out_ZOHW.to(torch.float32).unflatten(0, (2, -1))
        return guide(out_2BOHW[0], out_2BOHW[1], cfg, self.guided_channels)
