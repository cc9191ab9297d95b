"""Where checkpoint files are, and how one is read.

A file is looked for in this order: the path the user gives, the package (the small reference models are bundled), the
checkpoint folder: ``$QEXPORT_CHECKPOINTS``, or ``~/.cache/qexport/checkpoints``.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qexport.errors import CheckpointError
from qexport.family import ModelEntry

BUNDLED = Path(__file__).parent / "checkpoints"
FOLDER_VARIABLE = "QEXPORT_CHECKPOINTS"
_CHUNK_BYTES = 1 << 22


def checkpoint_folder() -> Path:
    """The folder in which published checkpoint files are looked for."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "qexport" / "checkpoints")


def locate(entry: ModelEntry, file: str, given: str | None, option: str) -> Path:
    """The path of `file`, one of `entry.files`; `given` is what the user passed to `option`.

    Raises:
        CheckpointError: no such file; says what to put where.
    """
    if given is not None:
        path = Path(given)
        if not path.is_file():
            kind = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise CheckpointError(f"{option} {given}: {kind}")
        return path
    if entry.bundled:
        return BUNDLED / file
    path = checkpoint_folder() / file
    if not path.is_file():
        raise CheckpointError(
            f"{entry.name} needs {file} ({entry.source}, licence {entry.licence}): put it at {path}, "
            f"or pass {option} FILE"
        )
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: the file is not readable as either, or is not a flat mapping of names to tensors, or a tensor
            holds NaN or Inf where a weight should be.
    """
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason[:160]})") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: is not a flat mapping from names to tensors")
    return {str(name): tensor for name, tensor in state.items()}


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
