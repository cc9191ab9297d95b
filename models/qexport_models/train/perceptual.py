"""The perceptual distance of the autoencoders: differences of FeatureNet's activations.

As LPIPS (arXiv:1801.03924, equation 1) without its learned weights: activations are divided by their length across
channels at every position, and the squared distances are averaged over positions and summed over layers. What exactly
the bundled autoencoders were trained with is not on record beyond "0.3 × FeatureNet perceptual term".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qexport_models.featurenet import FeatureNet

WEIGHT = 0.3
"""Of the perceptual term beside L1 + L2, on record for the bundled files."""


def perceptual_distance(net: FeatureNet, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean over images of the distance; images (B, 3, H, W) in [−1, 1], gradients flow to both."""
    total = a_BCHW.new_zeros(())
    for stage in (net.stem, net.stage1, net.stage2, net.stage3):
        a_BCHW, b_BCHW = stage(a_BCHW), stage(b_BCHW)
        difference = F.normalize(a_BCHW.float(), dim=1) - F.normalize(b_BCHW.float(), dim=1)
        total = total + difference.square().sum(dim=1).mean()
    return total


def reconstruction_terms(net: FeatureNet, found_BCHW: Tensor, wanted_BCHW: Tensor) -> dict[str, Tensor]:
    """L1 and L2, means over pixels, and the perceptual distance; images in [−1, 1]."""
    found = found_BCHW.float()
    return {
        "l1": F.l1_loss(found, wanted_BCHW),
        "l2": F.mse_loss(found, wanted_BCHW),
        "perceptual": perceptual_distance(net, found, wanted_BCHW),
    }


def reconstruction_loss(terms: dict[str, Tensor]) -> Tensor:
    """L1 + L2 + 0.3 × perceptual."""
    return terms["l1"] + terms["l2"] + WEIGHT * terms["perceptual"]
