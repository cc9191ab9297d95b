"""Fill a module from a state dict, or say in one line what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from qexport.errors import CheckpointError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NAMES_SHOWN = 3
"""A message names this many keys of each kind; more would not fit on a line."""


def check_layout(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Compare names and shapes of `state` with those of `module`; nothing is read, so both may be on ``meta``.

    Raises:
        CheckpointError: keys are missing, unexpected, or of another shape.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped))
    problems = [f"{label}: {_shown(names)}" for label, names in kinds if names]
    if problems:
        raise CheckpointError(f"checkpoint is not {what}; {'; '.join(problems)}")


def build_strict(make: Callable[[], ModuleT], state: Mapping[str, Tensor], what: str) -> ModuleT:
    """`make()` filled with `state`: every key, every shape, nothing else; float32, evaluation mode, no gradients.

    The module is made on torch's meta device, so its weights are neither initialised nor held twice. float16 and
    bfloat16 checkpoints are cast up exactly; float64 would be rounded.

    Raises:
        CheckpointError: keys are missing, unexpected, or of another shape.
    """
    with torch.device("meta"):
        module = make()
    check_layout(module, state, what)
    filled = {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in state.items()}
    module.load_state_dict(filled, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
