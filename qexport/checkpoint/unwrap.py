"""From what a checkpoint holds to one flat state dict: nested dicts, trainers' bookkeeping, prefixes of wrappers.

Which nested dict is taken, where there are several:

1. never one of training state (optimiser, scheduler, discriminator, …);
2. the decoder's for the role "vae", another for the role "model";
3. averaged weights (``ema`` …), because those are the ones to sample from;
4. then the names that trainers use for a model; then the only one that is left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from qexport.errors import CheckpointError

Role = Literal["model", "vae"]
"""Generator, or the decoder that turns its tokens or latents into pictures."""

MAX_DEPTH = 6
"""Dicts in dicts."""

AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_state_dict_ema")
PLAIN = ("trainer", "state_dict", "model_state_dict", "model", "module", "net", "network", "generator", "transformer",
         "params", "weights")  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_model.")
"""Put before every key by DataParallel, torch.compile, Lightning and EMA wrappers; no published layout has them."""

_TRAINING = re.compile(r"opt|sched|scaler|disc|loss|config|args", re.IGNORECASE)
_DECODER = re.compile(r"^(vae|vq|first_stage|decoder|autoencoder|tokenizer)", re.IGNORECASE)


def unwrap(raw: object, role: Role = "model") -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The flat state dict in `raw`, and the keys that lead to it.

    Raises:
        CheckpointError: there is none, there are several, or something in it is no tensor. Without the file's name.
    """
    trail: list[str] = []
    while nested := _nested(raw):
        if len(trail) == MAX_DEPTH:
            raise CheckpointError("is nested too deeply for a checkpoint")
        key = _chosen(nested, role)
        trail.append(key)
        raw = nested[key]
    return _without_wrappers(_flat(raw)), tuple(trail)


def holds_decoder(raw: object) -> bool:
    """Whether a dict of decoder weights lies beside others, as in the checkpoint of a trainer."""
    for _ in range(MAX_DEPTH):
        nested = _nested(raw)
        if any(_DECODER.match(key) for key in nested):
            return len(nested) > 1
        if not nested:
            break
        raw = nested[_chosen(nested, "vae")]
    return False


def _nested(raw: object) -> dict[str, Any]:
    """The entries of `raw` that may hold the weights of a model."""
    if not isinstance(raw, Mapping):
        return {}
    found = {str(k): v for k, v in raw.items() if isinstance(v, Mapping) and next(tensors_in(v), None) is not None}
    return {key: value for key, value in found.items() if not _TRAINING.search(key)}


def tensors_in(raw: object) -> Iterator[Tensor]:
    """Every tensor in a dict of dicts; each dict is visited once, since a pickle may hold one that contains itself."""
    waiting, seen = [raw], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values()


def _chosen(nested: Mapping[str, object], role: Role) -> str:
    decoders = [key for key in nested if _DECODER.match(key)]
    others = [key for key in nested if key not in decoders]
    candidates = (decoders or others) if role == "vae" else (others or decoders)
    for known in (*AVERAGED, *PLAIN):
        if known in candidates:
            return known
    if len(candidates) > 1:
        averaged = [key for key in candidates if "ema" in key.lower()]
        if len(averaged) != 1:
            shown = ", ".join(candidates[:4])
            raise CheckpointError(f"holds several models ({shown}); save the one you mean by itself")
        return averaged[0]
    return candidates[0]


def _flat(raw: object) -> dict[str, Tensor]:
    if not isinstance(raw, Mapping):
        kind = type(raw).__name__
        raise CheckpointError(f"is not a flat mapping from names to tensors, nor a dict that nests one, but a {kind}")
    odd = next(_odd(raw), None)
    if odd is not None:
        raise CheckpointError(f"is not a flat mapping from names to tensors; {odd}")
    if not raw:
        raise CheckpointError("holds no tensors")
    return dict(raw)


def _odd(raw: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in raw.items():
        if not isinstance(key, str):
            yield f"a key is {key!r}"
        elif not isinstance(value, Tensor):
            yield f"{key!r} is no tensor"
        elif value.layout != torch.strided or value.device.type != "cpu":
            yield f"{key!r} is not a plain tensor"


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if "n_averaged" in state and state["n_averaged"].ndim == 0:  # torch.optim.swa_utils.AveragedModel
        state = {key: value for key, value in state.items() if key != "n_averaged"}
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            if state and all(key.startswith(prefix) for key in state):
                state, stripped = {key.removeprefix(prefix): value for key, value in state.items()}, True
    compiled = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    return compiled if len(compiled) == len(state) else state
