"""Fill a module from a state dict, or say in one line what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from qexport.errors import CheckpointError
from qexport_models.recognise import looks_like

ModuleT = TypeVar("ModuleT", bound=nn.Module)

NAMES_SHOWN = 3
"""A message names this many keys of each kind; more would not fit on a line."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What a weight may be stored in. Other dtypes are already quantised, or no weights."""


def check_layout(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Compare names, shapes and dtypes of `state` with those of `module`; nothing is read.

    Tensors on ``meta`` stand for shapes only: their dtype is not looked at.

    Raises:
        CheckpointError: keys are missing, unexpected, of another shape or dtype; says which model it looks like.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    both = [(key, value, state[key]) for key, value in wanted.items() if key in state]
    reshaped = [
        f"{key} is {tuple(found.shape)}, expected {tuple(value.shape)}"
        for key, value, found in both
        if found.shape != value.shape
    ]
    recast = [
        f"{key} is {str(found.dtype).removeprefix('torch.')}, expected {_kind(value)}"
        for key, value, found in both
        if not (found.is_meta or _castable(found, value))
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped), ("wrong dtype", recast))
    problems = [f"{label}: {_shown(names)}" for label, names in kinds if names]
    if not problems:
        return
    guess = None
    if missing or unexpected or reshaped:
        guess = looks_like({key: tuple(value.shape) for key, value in state.items()})
    if guess and what.partition(" (")[0] not in guess:  # what stands in parentheses is the file
        problems.append(f"this looks like {guess}")
    raise CheckpointError(f"checkpoint is not {what}; {'; '.join(problems)}")


def check_finite(module: nn.Module, what: str) -> None:
    """Every parameter is finite; buffers may hold an infinity (a mask does).

    Raises:
        CheckpointError: naming the first that holds NaN or infinity, and how many numbers of it do.
    """
    for name, value in module.named_parameters():
        if value.is_meta:
            continue
        # A sum is one pass without a copy. It may overflow although all terms are finite: only then count.
        if not torch.isfinite(value.detach().sum(dtype=torch.float32)):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise CheckpointError(f"{what}: {name} holds NaN or infinity ({bad:,} of {value.numel():,}); damaged")


def build_strict(make: Callable[[], ModuleT], state: Mapping[str, Tensor], what: str) -> ModuleT:
    """`make()` filled with `state`: every key, every shape, nothing else; float32, evaluation mode, no gradients.

    The module is made on torch's meta device, so its weights are neither initialised nor held twice: float32 weights
    stay views of the file. float16 and bfloat16 are cast up exactly, float64 is rounded (half to even).

    Raises:
        CheckpointError: keys are missing, unexpected, of another shape or dtype, or a weight is not finite.
    """
    with torch.device("meta"):
        module = make()
    check_layout(module, state, what)
    filled = {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in state.items()}
    module.load_state_dict(filled, strict=True, assign=True)
    check_finite(module, what)
    return module.eval().requires_grad_(False)


def _castable(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype in FLOATS if wanted.is_floating_point() else found.dtype == wanted.dtype


def _kind(wanted: Tensor) -> str:
    return "a float of 16 to 64 bits" if wanted.is_floating_point() else str(wanted.dtype).removeprefix("torch.")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
