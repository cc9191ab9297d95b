"""Latents to pictures: the `decode` graph."""

from __future__ import annotations

from torch import Tensor, nn

from qexport_models.autoencoder_kl.model import AutoencoderKL


class Decode(nn.Module):
    """A denoiser's latent → image in [0, 1].

    Holds the decoder half only, under the names of the checkpoint, so that no weight of the encoder is exported.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = vae.config.scaling_factor
        self.downsampling = vae.config.downsampling
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, x_BChw: Tensor) -> tuple[Tensor]:
        """Scaled latents (B, latent channels, h, w) float32 → RGB images (B, 3, H, W) float32 in [0, 1]."""
        image_BCHW = self.decoder(self.post_quant_conv(x_BChw / self.scaling_factor))
        return (((image_BCHW + 1) / 2).clamp(0, 1),)
