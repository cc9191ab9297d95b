"""Writing a file whole or not at all, and refusing a place for it before the work that fills it.

One rule for every option that names a file or a folder to write: folders that are missing are made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from qexport.errors import InputError
from qexport.hidden import replacing


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, as of `replacing`; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        yield partial


def check_file(option: str, path: Path, suffix: str = "") -> None:
    """Nothing, where a file can be written at `path`; it may be there, and folders above it may be missing.

    Raises:
        InputError: it is a folder, does not end in `suffix`, or a folder above it cannot be made or written.
    """
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; name a file")
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"{option} {path}: must end in {suffix}, the format that is written")
    check_folder(option, path.parent)


def check_folder(option: str, folder: Path) -> None:
    """Nothing, where files can be written into `folder`; it, and folders above it, may be missing.

    Raises:
        InputError: it, or the nearest above it that is there, is a file or cannot be written.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"{option}: {there} is a file, so nothing can be written below it")
    if not os.access(there, os.W_OK):
        raise InputError(f"{option}: {there} cannot be written; choose another place")
