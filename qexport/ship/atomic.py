"""Writing files, or a folder, whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from qexport.hidden import partial_of


@contextlib.contextmanager
def moved_into(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A hidden folder inside `folder` to write to; the files named move into `folder`, the first of them last."""
    folder.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(folder / names[0]) as partial:
        yield partial
        for name in reversed(names):
            (partial / name).replace(folder / name)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `path` (which must not exist, or be empty) after the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder_beside(path) as partial:
        yield partial
        partial.replace(path)


@contextlib.contextmanager
def new_folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, on the same file system, that is gone after the block."""
    partial = partial_of(path)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
