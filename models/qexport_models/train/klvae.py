"""The objective of the KL autoencoder: L1 + L2 + 0.3 · perceptual + λ · KL(q(z | x) ‖ N(0, 1)).

z is drawn, mean + exp(½ log variance) · noise (arXiv:1312.6114, section 2.4). KL is the sum over latents, divided by
the number of pixel values, as the other terms are means over these.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.featurenet import FeatureNet
from qexport_models.train.data import to_unit
from qexport_models.train.perceptual import reconstruction_loss, reconstruction_terms
from qexport_models.train.task import LOSS, PlainTask

KL_WEIGHT = 1e-6
"""λ, as in latent diffusion (arXiv:2112.10752, appendix G); what the bundled file had is not on record."""

LOG_VARIANCE = (-30.0, 20.0)
"""Clamp of the log variance: its exponential stays finite in float32."""


class KLVAETask(PlainTask):
    """See module."""

    def __init__(self, module: AutoencoderKL, net: FeatureNet) -> None:
        self.module, self.net = module, net

    def frozen(self) -> list[nn.Module]:
        """FeatureNet."""
        return [self.net]

    def terms(self, x: Tensor, labels_B: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """See module."""
        del labels_B
        images_BCHW = to_unit(x)
        mean, log_variance = self.module.encode_moments(images_BCHW).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        latents = mean
        if self.module.training:
            noise = torch.randn(mean.shape, generator=rng).to(mean.device)
            latents = mean + torch.exp(0.5 * log_variance) * noise
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / images_BCHW.numel()
        found = reconstruction_terms(self.net, self.module.decode(latents), images_BCHW)
        return {LOSS: reconstruction_loss(found) + KL_WEIGHT * kl, **found, "kl": kl}

    @torch.no_grad()
    def metadata(self, examples: Tensor) -> dict[str, str]:
        """`scaling_factor`: what gives the mean latents unit variance.

        `AutoencoderKLConfig.scaling_factor` holds the bundled file's.
        """
        latents = self.module.encode_mean(to_unit(examples))
        return {"scaling_factor": f"{1 / float(latents.double().std()):.4f}"}
