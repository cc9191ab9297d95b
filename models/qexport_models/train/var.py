"""The objective of VAR: cross-entropy of every token of an image, given its class and all coarser scales.

Teacher forced in one pass under the block-causal mask (VAR, arXiv:2404.02905, section 3.1); mean over positions, so the
finest scale, 64 of 155 tokens, counts most. Tokens are the frozen VQVAE's and are computed once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.train.data import to_unit
from qexport_models.train.task import LOSS, PlainTask, drop_labels
from qexport_models.var.model import VAR
from qexport_models.var.vqvae import VQVAE

LABEL_DROP = 0.1
"""On record for the bundled files."""


class VARTask(PlainTask):
    """See module. Examples are tokens (B, L) int32."""

    def __init__(self, module: VAR, vae: VQVAE) -> None:
        self.module, self.vae = module, vae

    def frozen(self) -> list[nn.Module]:
        """The VQVAE."""
        return [self.vae]

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 images → tokens (B, L) int32."""
        device = next(self.vae.parameters()).device
        return torch.cat(self.vae.tokenize(to_unit(pixels_BCHW.to(device))), dim=1).to(torch.int32)

    def terms(self, x: Tensor, labels_B: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """See module."""
        config = self.module.config
        tokens_BL = x.long()
        if self.module.training:
            labels_B = drop_labels(labels_B, LABEL_DROP, config.num_classes, rng)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            by_scale = list(torch.split(tokens_BL, list(config.tokens_per_scale), dim=1))
            maps_BLZ = self.vae.quantize.teacher_forcing_input(by_scale)
        logits_BLV = self.module(labels_B, maps_BLZ).float()
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL.flatten())
        return {LOSS: loss}
