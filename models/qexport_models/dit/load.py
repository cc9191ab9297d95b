"""A DiT from a state dict: published, training checkpoint, or diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qexport.errors import CheckpointError
from qexport_models.dit.config import DiTConfig
from qexport_models.dit.diffusers_layout import from_diffusers, is_diffusers_layout
from qexport_models.dit.model import DiT
from qexport_models.strict_load import build_strict

EMA_KEY = "ema"
"""Training checkpoints nest the averaged weights, which are the ones to sample from, under this key."""


def published_state(raw: Mapping[str, Any], config: DiTConfig) -> dict[str, Tensor]:
    """What a checkpoint file held, as a flat state dict in the published layout.

    Raises:
        CheckpointError: an entry is not a tensor, or diffusers' copies of an embedder differ.
    """
    flat = raw[EMA_KEY] if isinstance(raw.get(EMA_KEY), Mapping) else raw
    if odd := next((key for key, value in flat.items() if not isinstance(value, Tensor)), None):
        raise CheckpointError(
            f"checkpoint is not a DiT: {odd!r} is no tensor; expected a state dict, flat or under 'ema'"
        )
    return from_diffusers(flat, config) if is_diffusers_layout(flat) else dict(flat)


def build_dit(config: DiTConfig, raw: Mapping[str, Any]) -> DiT:
    """A DiT in float32 and evaluation mode, filled strictly from what a checkpoint file held.

    Raises:
        CheckpointError: naming keys that are missing, unexpected or of another shape.
    """
    what = f"a DiT with {config.depth} blocks of width {config.hidden_size} and patch {config.patch_size}"
    return build_strict(lambda: DiT(config), published_state(raw, config), what)
