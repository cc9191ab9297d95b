"""The objective of FeatureNet: cross-entropy of the class, on images that are shifted by up to four pixels.

Shifting (padding by reflection, cropping at random) and mirroring are the usual pair for CIFAR-10 (He et al. 2015,
section 4.2). How the bundled FeatureNet was trained is not on record.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qexport_models.featurenet import FeatureNet
from qexport_models.train.data import to_unit
from qexport_models.train.task import LOSS, PlainTask

MOST_SHIFT = 4


class FeatureNetTask(PlainTask):
    """See module."""

    def __init__(self, module: FeatureNet) -> None:
        self.module = module

    def terms(self, x: Tensor, labels_B: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy and accuracy."""
        images_BCHW = to_unit(x)
        if self.module.training:
            images_BCHW = shifted(images_BCHW, rng)
        _, logits_BK = self.module(images_BCHW)
        accuracy = (logits_BK.argmax(dim=1) == labels_B).float().mean()
        return {LOSS: F.cross_entropy(logits_BK.float(), labels_B), "accuracy": accuracy}


def shifted(images_BCHW: Tensor, rng: torch.Generator) -> Tensor:
    """Every image moved by its own −4 … 4 pixels in each direction; what comes in is mirrored at the edge."""
    batch, _, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, [MOST_SHIFT] * 4, mode="reflect")
    top_B, left_B = torch.randint(2 * MOST_SHIFT + 1, (2, batch), generator=rng).to(images_BCHW.device)
    device = images_BCHW.device
    row_BH1 = (top_B[:, None] + torch.arange(height, device=device))[:, :, None]
    column_B1W = (left_B[:, None] + torch.arange(width, device=device))[:, None, :]
    image_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded[image_B11, :, row_BH1, column_B1W].permute(0, 3, 1, 2).contiguous()
