"""Recorded calls on disk, a file for each batch, so that memory holds the batch in use and no other.

A file is written under another name and renamed when it is complete, so it is there whole or not at all. It is a
safetensors file; what is said of the calls lies in its header as JSON. It is read by mapping: a tensor takes up memory
once it is looked at, and gives it back when its batch is dropped.

A tensor that several calls share is written once. One that stands for zeros and takes up no room (a cache, see
`qexport.calibrate.record`) is written as its shape.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qexport.errors import InputError
from qexport.hidden import replacing


@dataclass(frozen=True)
class RecordedCall:
    """What one call of a graph was fed. `step` is its number for scales per step, None where there are none."""

    graph: str
    step: int | None
    feeds: Mapping[str, Tensor]


Trajectory = tuple[RecordedCall, ...]
"""The kept calls of one batch of images, in order."""

_CALLS = "calls"


class Shelf:
    """A folder of trajectories by name."""

    def __init__(self, folder: Path | None) -> None:
        """Take the folder, and make it; None makes a temporary one, which goes when this does.

        Raises:
            InputError: it cannot be made.
        """
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="qexport-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made, to keep recorded calls in: {error}") from error

    def holds(self, name: str) -> bool:
        """Whether there is a trajectory of that name."""
        return self._path(name).exists()

    def put(self, name: str, calls: Iterable[RecordedCall]) -> None:
        """Keep a trajectory.

        Raises:
            InputError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        keys: dict[tuple[Any, ...], str] = {}
        held: list[Tensor] = []  # an address is one tensor's as long as that lives
        buffers: set[int] = set()

        def described(x: Tensor) -> str | dict[str, Any]:
            if is_stand_in(x):
                return {"zeros": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
            where = (x.data_ptr(), x.dtype, x.shape, x.stride())
            if where not in keys:
                held.append(x)
                keys[where] = str(len(keys))
                tensors[keys[where]] = _plain(x, buffers)
            return keys[where]

        told = [[call.graph, call.step, {port: described(x) for port, x in call.feeds.items()}] for call in calls]
        path = self._path(name)
        try:
            with replacing(path) as partial:
                save_file(tensors, partial, {_CALLS: json.dumps(told)})
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be written ({error}); recorded calls need room on the disk") from error

    def get(self, name: str) -> Trajectory:
        """The trajectory of that name; its tensors are mapped.

        Raises:
            InputError: the file is not what was written.
        """
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(file.metadata()[_CALLS])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
            return tuple(
                RecordedCall(graph, step, {port: _restored(what, tensors) for port, what in feeds.items()})
                for graph, step, feeds in told
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: is damaged ({error}); delete it, and its calls are recorded again") from error

    def drop(self, name: str) -> None:
        """Forget a trajectory, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def stand_in(x: Tensor) -> Tensor:
    """Zeros of the same shape that take up no room."""
    return zeros_of(tuple(x.shape), x.dtype)


def zeros_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A single zero, seen as many."""
    return torch.zeros((), dtype=dtype).expand(shape)


def is_stand_in(x: Tensor) -> bool:
    """Whether this was made by `stand_in`, of more than one element or of none."""
    if x.numel() == 1 or x.untyped_storage().nbytes() > x.element_size():
        return False
    return not x.numel() or not bool(x[(0,) * x.ndim])


def _plain(x: Tensor, buffers: set[int]) -> Tensor:
    """What safetensors writes: contiguous, in a buffer of its own; `buffers` are those that are taken."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    if not whole or x.untyped_storage().data_ptr() in buffers:
        x = x.detach().clone(memory_format=torch.contiguous_format)
    buffers.add(x.untyped_storage().data_ptr())
    return x


def _restored(what: str | dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[what] if isinstance(what, str) else zeros_of(tuple(what["zeros"]), getattr(torch, what["dtype"]))
