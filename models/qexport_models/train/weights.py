"""Weight files: models to go on from, and what training writes: fp16 safetensors in the published layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qexport.errors import InputError
from qexport.family import find_model
from qexport_models.autoencoder_kl.config import KLVAE_C10
from qexport_models.autoencoder_kl.load import build_autoencoder_kl
from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.checkpoints import BUNDLED, read_state
from qexport_models.dit.config import CONFIGS, DiTConfig
from qexport_models.dit.load import build_dit
from qexport_models.featurenet import WEIGHTS as FEATURENET_FILE
from qexport_models.featurenet import FeatureNet
from qexport_models.strict_load import build_strict
from qexport_models.train import initial
from qexport_models.train.dit import DiTTask
from qexport_models.train.featurenet import FeatureNetTask
from qexport_models.train.klvae import KLVAETask
from qexport_models.train.recipe import Recipe
from qexport_models.train.task import Task
from qexport_models.train.var import VARTask
from qexport_models.train.vqvae import VQVAETask
from qexport_models.var.config import VARConfig, VQVAEConfig
from qexport_models.var.model import VAR
from qexport_models.var.vqvae import VQVAE

FP16_MAX = torch.finfo(torch.float16).max
VQVAE_FILE, KLVAE_FILE = "vqvae-c10.safetensors", "klvae-c10.safetensors"
_SMALLEST = "var-c10-d2"


def vqvae_config() -> VQVAEConfig:
    """Of `vqvae-c10`."""
    return find_model(_SMALLEST)[1].config["vae"]


def var_config(depth: int) -> VARConfig:
    """Of `var-c10-d{depth}`, whether or not such a file exists."""
    return replace(find_model(_SMALLEST)[1].config["var"], depth=depth, width=64 * depth, heads=depth)


def dit_config(depth: int) -> DiTConfig:
    """Of `dit-c10-d{depth}`, whether or not such a file exists."""
    return replace(CONFIGS["dit-c10-d2"], depth=depth, hidden_size=64 * depth, num_heads=depth)


def make_task(recipe: Recipe, init: Path | None = None, vae: Path | None = None, net: Path | None = None) -> Task:
    """The model and its objective.

    Args:
        recipe: which, and the seed of new weights.
        init: weights to go on from.
        vae: the frozen VQVAE of VAR or KL autoencoder of DiT; None takes the bundled one.
        net: the frozen FeatureNet of the autoencoders; None takes the bundled one.

    Raises:
        CheckpointError: a file is missing, unreadable, or of another architecture.
    """
    seed, depth = recipe.seed, recipe.depth
    if recipe.kind == "var":
        var = _var(var_config(depth), init) if init else initial.new_var(var_config(depth), seed)
        return VARTask(initial.trainable(var), _vqvae(vae or BUNDLED / VQVAE_FILE))
    if recipe.kind == "dit":
        dit = build_dit(dit_config(depth), read_state(init)) if init else initial.new_dit(dit_config(depth), seed)
        return DiTTask(initial.trainable(dit), _klvae(vae or BUNDLED / KLVAE_FILE))
    if recipe.kind == "featurenet":
        return FeatureNetTask(initial.trainable(_featurenet(init) if init else initial.new_featurenet(seed)))
    features = _featurenet(net or BUNDLED / FEATURENET_FILE)
    if recipe.kind == "vqvae":
        vqvae = _vqvae(init) if init else initial.new_vqvae(vqvae_config(), seed)
        return VQVAETask(initial.trainable(vqvae), features)
    klvae = _klvae(init) if init else initial.new_klvae(seed)
    return KLVAETask(initial.trainable(klvae), features)


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a state dict, floats as fp16, under another name, then rename.

    `metadata` goes under one key, ``training``, as JSON: safetensors writes several in an order that changes from run
    to run, and the same training is to give the same bytes.

    Raises:
        InputError: a weight is not finite or beyond fp16, or the file cannot be written.
    """
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu()
        if tensor.is_floating_point():
            parameter = name in dict(module.named_parameters())
            if parameter and not tensor.abs().max() <= FP16_MAX:
                raise InputError(f"{path}: {name} holds numbers that fp16 has not; train at a lower --lr")
            tensor = tensor.to(torch.float16)
        state[name] = tensor.contiguous()
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file(state, temporary, {"training": json.dumps(dict(metadata))})
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def _var(config: VARConfig, path: Path) -> VAR:
    return build_strict(lambda: VAR(config), read_state(path), f"a VAR of depth {config.depth} ({path.name})")


def _vqvae(path: Path) -> VQVAE:
    return build_strict(lambda: VQVAE(vqvae_config()), read_state(path, "vae"), f"VAR's VQVAE ({path.name})")


def _klvae(path: Path) -> AutoencoderKL:
    return build_autoencoder_kl(KLVAE_C10, read_state(path, "vae"))


def _featurenet(path: Path) -> FeatureNet:
    return build_strict(FeatureNet, read_state(path), f"FeatureNet ({path.name})")
