"""What reader and writer both need to know about files: names, hashes, listing, and what an `OSError` means."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qexport.errors import BundleError, InputError
from qexport.hidden import meant_by

MANIFEST = "manifest.json"
WEIGHTS = "weights.data"
REPORTS = "reports"

_HASH_CHUNK_BYTES = 1 << 20

_ADVICE = {
    errno.ENOSPC: "no space left on the disk; free some, or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or write to another disk",
    errno.EFBIG: "the file system does not take files this large; write to another disk",
    errno.EROFS: "the file system is read-only; write somewhere else",
    errno.EACCES: "permission denied; mend the permissions or write somewhere else",
    errno.EPERM: "operation not permitted; mend the permissions or write somewhere else",
    errno.EEXIST: "a file of that name is in the way; write somewhere else",
    errno.ENOTDIR: "a parent of it is a file; write somewhere else",
}


def explain_os_error(error: OSError, where: Path) -> InputError | None:
    """The one-line `InputError` for a file system that refuses, or None if `error` is of another kind.

    `where` is named if the error does not say itself which file it is about. Hidden names are not shown.
    """
    advice = _ADVICE.get(error.errno or 0)
    return InputError(f"{meant_by(str(error.filename or where))}: {advice}") if advice else None


def check_relative(path: object) -> str:
    """Return `path` if it is a plain relative POSIX path that stays inside the folder it is joined to.

    Raises:
        BundleError: it is absolute, climbs with ``..``, is not normal (``a//b``, ``./a``), or has odd characters.
    """
    good = (
        isinstance(path, str)
        and path.isprintable()
        and not set(path) & set("\\:")  # Windows would read a separator or a drive into these
        and all(part not in ("", ".", "..") for part in path.split("/"))
    )
    if not isinstance(path, str) or not good:
        raise BundleError(f"manifest names the path {path!r}, which may leave the bundle; do not use this bundle")
    return path


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `root`, as (relative POSIX path, stat of what it leads to), in order of name.

    Raises:
        BundleError: a symbolic link leads out of `root` or to a folder, or something is neither file nor folder.
    """
    resolved_root = root.resolve()
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders.sort()
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        for name in sorted(names + links):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(resolved_root):
                raise BundleError(f"{path}: a symbolic link that leaves the bundle; copy the bundle with `cp -rL`")
            try:
                status = path.stat()
            except FileNotFoundError:
                raise BundleError(f"{path}: a symbolic link that leads nowhere; copy the bundle again") from None
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path}: neither a file nor a folder; copy the bundle again without it")
            yield relative, status


def in_reports(relative: str) -> bool:
    """Whether a relative path lies in ``reports/``, outside the hashes."""
    return relative.startswith(REPORTS + "/")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flush the bytes of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk, where the system can (Windows cannot open a folder)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> None:
    raise error
