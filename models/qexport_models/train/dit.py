"""The objective of DiT: squared error of the noise, and a bound on the likelihood that trains the variance alone.

    L = E ‖ε_θ(x_t, t, y) − ε‖² + L_vlb

as DiT trains (arXiv:2212.09748, section 4): t uniform over 1000 steps of linear betas, labels dropped. L_vlb is the
hybrid loss of improved diffusion (arXiv:2102.09672, section 3.1, equations 4 to 7, 15 and 16): the term of the
variational bound at t, in bits per dimension, with its mean held fixed, so that it reaches the variance channels only.
Their weight of 0.001 on the sum over 1000 steps is weight 1 on the mean over t, which is what a drawn t estimates.

At t = 0 the bound asks for the likelihood of the data itself, which those papers take as 8-bit pixels. Latents are not;
here it is the mass of the normal distribution in a bin of the same width, without the open bins of pixels at the ends.

Latents are the frozen KL autoencoder's means times its scaling factor and are computed once (its posterior is narrow:
a standard deviation of 0.02, where the latents have 1).

Legend: B batch, C latent channels, H W latent side.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.dit.model import DiT
from qexport_models.dit.schedule import TRAINING_STEPS, make_schedule
from qexport_models.train.data import to_unit
from qexport_models.train.task import LOSS, PlainTask, drop_labels

LABEL_DROP = 0.1
"""On record for the bundled files."""

BIN_HALF_WIDTH = 1 / 255
"""Half a step of 8-bit pixels on [−1, 1]."""

LEAST_MASS = 1e-12
"""Of a bin: far from the mean the difference of two float32 probabilities is 0, and its logarithm infinite."""


class Bound:
    """Tables of the schedule that the variational bound needs, (1000,) float32 each."""

    def __init__(self) -> None:
        schedule = make_schedule()
        columns = {
            "sqrt_alpha": np.sqrt(schedule.alphas_cumprod),
            "sqrt_rest": np.sqrt(1 - schedule.alphas_cumprod),
            "recip": schedule.sqrt_recip_alphas_cumprod,
            "recipm1": schedule.sqrt_recipm1_alphas_cumprod,
            "x0_coef": schedule.posterior_mean_coef1,
            "x_coef": schedule.posterior_mean_coef2,
            "log_beta": schedule.log_betas,
            "log_posterior": schedule.posterior_log_variance_clipped,
        }
        self._tables = {name: torch.from_numpy(column.astype(np.float32)) for name, column in columns.items()}

    def at(self, name: str, t_B: Tensor) -> Tensor:
        """A table's entries at the timesteps, (B, 1, 1, 1)."""
        return self._tables[name].to(t_B.device)[t_B][:, None, None, None]

    def noisy(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """√ᾱ_t·x₀ + √(1 − ᾱ_t)·ε (arXiv:2006.11239, equation 4)."""
        return self.at("sqrt_alpha", t_B) * x0 + self.at("sqrt_rest", t_B) * noise

    def term(self, x0: Tensor, xt: Tensor, eps: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
        """The bound's term at t, bits per dimension, (B,); all of the others (B, C, H, W)."""
        x0_found = self.at("recip", t_B) * xt - self.at("recipm1", t_B) * eps
        true_mean, mean = (
            self.at("x0_coef", t_B) * clean + self.at("x_coef", t_B) * xt for clean in (x0, x0_found)
        )  # fmt: skip
        low, high = self.at("log_posterior", t_B), self.at("log_beta", t_B)
        share = (v + 1) / 2
        log_variance = share * high + (1 - share) * low
        kl = normal_kl(true_mean, low, mean, log_variance)
        decoder = -bin_log_mass(x0, mean, log_variance)
        term = torch.where((t_B == 0)[:, None, None, None], decoder, kl)
        return term.flatten(1).mean(dim=1) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) of normal distributions, element by element, nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + distance)


def bin_log_mass(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Logarithm of the mass that N(mean, variance) has within `BIN_HALF_WIDTH` of x, element by element, nats."""
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = ((x - mean + sign * BIN_HALF_WIDTH) * scale for sign in (1, -1))
    return (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=LEAST_MASS).log()


class DiTTask(PlainTask):
    """See module. Examples are latents (B, C, H, W) float32, scaled."""

    def __init__(self, module: DiT, vae: AutoencoderKL) -> None:
        self.module, self.vae = module, vae
        self._bound = Bound()

    def frozen(self) -> list[nn.Module]:
        """The KL autoencoder."""
        return [self.vae]

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images → scaled mean latents."""
        device = next(self.vae.parameters()).device
        return self.vae.encode_mean(to_unit(pixels_BCHW.to(device))) * self.vae.config.scaling_factor

    def terms(self, x: Tensor, labels_B: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Timesteps and noise are drawn, labels dropped; see `terms_at`.

        For judging, timesteps are spread evenly over the batch: the loss at t = 0 is a hundred times that at the end.
        """
        t_B = torch.linspace(0, TRAINING_STEPS - 1, len(x), dtype=torch.float64).long().to(x.device)
        noise = torch.randn(x.shape, generator=rng).to(x.device)
        if self.module.training:
            t_B = torch.randint(TRAINING_STEPS, (len(x),), generator=rng).to(x.device)
            labels_B = drop_labels(labels_B, LABEL_DROP, self.module.config.null_class, rng)
        return self.terms_at(x, noise, t_B, labels_B)

    def terms_at(self, x: Tensor, noise: Tensor, t_B: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """The objective at given timesteps (B,) int64 and noise (B, C, H, W)."""
        noisy = self._bound.noisy(x, noise, t_B)
        out = self.module(noisy, t_B, labels_B).float()
        eps, v = out.chunk(2, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            squared = (eps - noise).square().mean()
            bound = self._bound.term(x, noisy, eps.detach(), v, t_B).mean()
        return {LOSS: squared + bound, "noise_mse": squared, "vlb_bits": bound}
