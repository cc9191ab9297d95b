"""Weights to start from: drawn per parameter by name (`random_weights`), so that they depend on the seed alone.

Transformers begin as the identity: modulations are zero, and with them the gates of every block (adaLN-Zero,
arXiv:2212.09748, section 3.2); the head begins near the uniform distribution.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

from qexport_models.autoencoder_kl.config import KLVAE_C10
from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.dit.config import DiTConfig
from qexport_models.dit.embed import position_table
from qexport_models.dit.model import DiT
from qexport_models.featurenet import FeatureNet
from qexport_models.random_weights import Fan, Normal, Rules, build_random
from qexport_models.var.config import VARConfig, VQVAEConfig
from qexport_models.var.model import VAR
from qexport_models.var.vqvae import VQVAE

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_ZERO, _ONE = Normal(0.0), Normal(0.0, 1.0)
_RELU = Fan(math.sqrt(2))  # He et al. 2015, equation 10

_CONVOLUTIONS: Rules = (
    (r"norm\w*\.weight$", _ONE),
    (r"conv_shortcut\.weight$|nin_shortcut\.weight$", Fan()),
    (r"(conv2|proj_out|to_out\.0)\.weight$", _ZERO),  # every residual branch begins at nothing
    (r"quantize\.embedding\.weight$", Normal(0.5)),
    (r"bias$", _ZERO),
)
_VAR: Rules = (
    (r"scale_mul_1H11$", Normal(0.0, math.log(4.0))),
    (r"ada_lin\.1\.weight$", _ZERO),
    (r"head\.weight$", Fan(0.1)),
    (r"bias$", _ZERO),
)
_DIT: Rules = (
    (r"(adaLN_modulation\.1|final_layer\.linear)\.weight$", _ZERO),
    (r"bias$", _ZERO),
)
_FEATURENET: Rules = (
    (r"(stem|body\.\d|stage\d\.\d)\.0\.weight$", _RELU),
    (r"\.1\.weight$", _ONE),
    (r"bias$", _ZERO),
)


def new_var(config: VARConfig, seed: int) -> VAR:
    """A VAR before training."""
    return trainable(build_random(lambda: VAR(config), seed, "var.", _VAR))


def new_vqvae(config: VQVAEConfig, seed: int) -> VQVAE:
    """A VQVAE before training."""
    return trainable(build_random(lambda: VQVAE(config), seed, "vqvae.", _CONVOLUTIONS))


def new_klvae(seed: int) -> AutoencoderKL:
    """A KL autoencoder before training."""
    return trainable(build_random(lambda: AutoencoderKL(KLVAE_C10), seed, "klvae.", _CONVOLUTIONS))


def new_dit(config: DiTConfig, seed: int) -> DiT:
    """A DiT before training; its position table is what it always is."""
    dit = build_random(lambda: DiT(config), seed, "dit.", _DIT)
    dit.pos_embed.copy_(torch.from_numpy(position_table(config.hidden_size, config.grid_size))[None])
    return trainable(dit)


def new_featurenet(seed: int) -> FeatureNet:
    """A FeatureNet before training."""
    return trainable(build_random(FeatureNet, seed, "featurenet.", _FEATURENET))


def trainable(module: ModuleT) -> ModuleT:
    """The module in training mode with gradients, but for the position table of a DiT, which is fixed."""
    module.train().requires_grad_(True)
    if isinstance(module, DiT):
        module.pos_embed.requires_grad_(False)
    return module
