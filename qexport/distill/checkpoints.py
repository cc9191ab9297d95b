"""Checkpoints of a training run: written whole or not at all, and read only by the run that wrote them.

Under ``<work>/<key>/`` lie ``data.pt``, the samples, and ``training.pt``, everything else. The key is a hash of all
that decides the result, so that a run with other settings starts afresh beside it instead of going on from there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from qexport.errors import InputError
from qexport.hidden import replacing

_KEY_LENGTH = 16


def key_of(*parts: Any) -> str:
    """A name for a run from plain data (what JSON can hold) and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:_KEY_LENGTH]


class Checkpoints:
    """The folder of one run."""

    def __init__(self, work: Path, key: str) -> None:
        """Make the folder.

        Raises:
            InputError: it cannot be made.
        """
        self.folder = Path(work) / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be made ({error.strerror}); choose another folder") from error

    def save(self, name: str, state: Any) -> None:
        """Write under another name and rename, so that what is there is whole whenever the process ends.

        Raises:
            InputError: it cannot be written, because the disk is full, say.
        """
        try:
            with replacing(self.folder / name) as partial:
                torch.save(state, partial)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.folder / name}: cannot be written ({error})") from error

    def load(self, name: str) -> Any | None:
        """What was saved, on the CPU; None if nothing was. Nothing in the file is executed.

        Raises:
            InputError: it is damaged.
        """
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds, from zip to pickle
            raise InputError(f"{path}: damaged ({type(error).__name__}); delete it to start again") from error
