"""When two modules trace to the same graph: equal signatures.

A trace holds no weights, so it depends on classes, shapes and plain attributes. Whatever is not known to be plain
(a closure, an object of a foreign class) makes the answer None: not known.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_OWN = frozenset(vars(nn.Module()))
"""What torch keeps in every module: parameters, buffers, submodules, hooks, whether it trains."""

_HOOKS = tuple(name for name in _OWN if name.endswith("_hooks"))
_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, type)


class _NotPlainError(Exception):
    pass


def signature(module: nn.Module) -> Hashable | None:
    """Equal for modules that trace to the same graph; None where that cannot be told.

    Code is taken to be what the classes' `forward` is; functions that it calls are not looked into.
    """
    seen: dict[int, int] = {}
    try:
        return tuple(
            (name, type(own), type(own).forward, own.training, _state(own, seen), _attributes(own))
            for name, own in module.named_modules(remove_duplicate=False)
        )
    except _NotPlainError:
        return None


def _state(module: nn.Module, seen: dict[int, int]) -> Hashable:
    """Names, shapes and dtypes, and which tensors are one: a tied weight is traced under one of its names."""
    if any(getattr(module, name) for name in _HOOKS):
        raise _NotPlainError
    held = (
        *module.named_parameters(recurse=False, remove_duplicate=False),
        *module.named_buffers(recurse=False, remove_duplicate=False),
    )
    return tuple((name, tuple(value.shape), value.dtype, seen.setdefault(id(value), len(seen))) for name, value in held)


def _attributes(module: nn.Module) -> Hashable:
    return tuple((name, _plain(value)) for name, value in sorted(vars(module).items()) if name not in _OWN)


def _plain(value: Any) -> Hashable:
    """`value` as something that is equal exactly where it is, types included."""
    if isinstance(value, float):
        return float, value.hex()  # 0.0 is not −0.0
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, tuple | list | torch.Size):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_plain(key), _plain(item)) for key, item in value.items())
    if isinstance(value, torch.Tensor | np.ndarray):
        array = _array(value)
        return type(value), str(array.dtype), array.shape, array.tobytes()
    if isinstance(value, types.BuiltinFunctionType) or (
        isinstance(value, types.FunctionType) and value.__closure__ is None
    ):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(
            (field.name, _plain(getattr(value, field.name))) for field in dataclasses.fields(value)
        )
    raise _NotPlainError


def _array(value: torch.Tensor | np.ndarray) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        try:
            value = value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:  # bfloat16, sparse, on no device
            raise _NotPlainError from error
    if value.dtype.hasobject:
        raise _NotPlainError
    return value
