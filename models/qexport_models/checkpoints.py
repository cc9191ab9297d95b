"""Where the checkpoint files of a model lie; how one is read is `qexport.checkpoint`.

A file is looked for in this order: the path the user gives, the package (the small reference models are bundled), the
checkpoint folder (``$QEXPORT_CHECKPOINTS``, or ``~/.cache/qexport/checkpoints``), the Hugging Face Hub.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from qexport.checkpoint import Role, companion, find_weights, open_checkpoint, sha256
from qexport.errors import CheckpointError
from qexport.family import ModelEntry
from qexport_models.published import PUBLISHED, NotFetchedError, check_hash, fetch

__all__ = ["checkpoint_folder", "companion", "locate", "read_state", "sha256"]

BUNDLED = Path(__file__).parent / "checkpoints"
FOLDER_VARIABLE = "QEXPORT_CHECKPOINTS"
VAE_OPTION = "--vae-checkpoint"


def checkpoint_folder() -> Path:
    """The folder in which published checkpoint files are looked for."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "qexport" / "checkpoints")


def locate(entry: ModelEntry, file: str, given: str | None, option: str) -> Path:
    """The path of `file`, one of `entry.files`; `given` is what the user passed to `option`.

    What is given may be a folder (diffusers) or an index of shards; the path returned is a weight file or an index. A
    published file that is not here is fetched, and its hash is checked as far as one is known.

    Raises:
        CheckpointError: no such file; says what to put where.
    """
    if given is not None:
        try:
            return find_weights(given, "vae" if option == VAE_OPTION else "model")
        except CheckpointError as error:
            raise CheckpointError(f"{option} {error}") from error
    if entry.bundled or (BUNDLED / file).is_file():  # the decoder of a larger reference model is bundled too
        return BUNDLED / file
    path = checkpoint_folder() / file
    if path.is_file():
        check_hash(file, path, sha256)
        return path
    try:
        found = find_weights(fetch(file))
        check_hash(file, found, sha256)
        return found
    except NotFetchedError as error:
        where = PUBLISHED[file].url if file in PUBLISHED else entry.source
        raise CheckpointError(
            f"{entry.name} needs {file} ({where}, licence {entry.licence}): put it at {path}, "
            f"or pass {option} FILE ({error})"
        ) from error


def read_state(path: Path, role: Role = "model") -> dict[str, Tensor]:
    """The tensors of a checkpoint, flat, on the CPU, views of the file; nothing in the file is executed.

    Raises:
        CheckpointError: see `qexport.checkpoint.open_checkpoint`.
    """
    return dict(open_checkpoint(path, role).state)
