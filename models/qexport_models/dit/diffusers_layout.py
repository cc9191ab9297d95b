"""State dicts of diffusers' `DiTTransformer2DModel`, renamed to the published layout.

Same weights, other names: q, k and v lie apart, the timestep and class embedders are stored once per block although
they are one, and the position table is not stored. The semantics stay the published ones; diffusers' own arithmetic
differs in three ways, each an option where one wants its pictures: `DiTConfig(frequency_denominator=127)`,
`DenoiseStep(guided_channels=4)` and `ddpm_rows(learned_variance=False)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from qexport.errors import CheckpointError
from qexport_models.dit.config import DiTConfig
from qexport_models.dit.embed import position_table

_EMBEDDER = "norm1.emb."

_SHARED = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def is_diffusers_layout(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys are diffusers' names."""
    return any(key.startswith("transformer_blocks.") for key in state)


def from_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The published layout of `state`; keys that are not understood pass through, for strict loading to name them.

    Raises:
        CheckpointError: the blocks' copies of an embedder differ, or a block lacks one of q, k, v.
    """
    table_TD = position_table(config.hidden_size, config.grid_size)
    renamed: dict[str, Tensor] = {"pos_embed": torch.from_numpy(table_TD)[None]}
    origin: dict[str, str] = {}
    for key, value in state.items():
        new = _renamed(key)
        if new in origin and not _same(renamed[new], value):
            raise CheckpointError(
                f"diffusers DiT: {key} differs from {origin[new]}; the published layout has one of them"
            )
        if new not in origin:
            renamed[new], origin[new] = value, key
    return _fused(renamed)


def _renamed(key: str) -> str:
    name, _, leaf = key.rpartition(".")
    if name in _OUTSIDE:
        return f"{_OUTSIDE[name]}.{leaf}"
    if match := _BLOCK.fullmatch(name):
        index, inner = match.groups()
        if inner.startswith(_EMBEDDER) and inner.removeprefix(_EMBEDDER) in _SHARED:
            return f"{_SHARED[inner.removeprefix(_EMBEDDER)]}.{leaf}"
        return f"blocks.{index}.{_IN_BLOCK.get(inner, inner)}.{leaf}"
    return key


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack q, k, v by rows into qkv."""
    fused: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix, part, leaf = _split_qkv(key)
        if part is None:
            fused[key] = value
        elif part == _QKV[0]:
            parts = [f"{prefix}{name}.{leaf}" for name in _QKV]
            if lacking := [name for name in parts if name not in state]:
                raise CheckpointError(f"diffusers DiT: {lacking[0]} is missing")
            fused[f"{prefix}attn.qkv.{leaf}"] = torch.cat([state[name] for name in parts])
    return fused


def _split_qkv(key: str) -> tuple[str, str | None, str]:
    name, _, leaf = key.rpartition(".")
    for part in _QKV:
        if name.endswith("." + part):
            return name.removesuffix(part), part, leaf
    return key, None, leaf


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal values; on the meta device, where there are none, equal shapes."""
    return a.shape == b.shape and (a.is_meta or torch.equal(a, b))
