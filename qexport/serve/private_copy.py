"""Loading a bundle so that nothing that happens to its files afterwards can change an answer.

ONNX Runtime maps weights into memory instead of reading them, so bytes that are altered in place after the load reach
the next image (seen: overwriting weights.data under a loaded session changes what it computes), and a truncated file
ends the process with a bus error. A service therefore loads a copy of its own.

In one process the copy loses its name at once: the mapping keeps the bytes alive, and nobody can open them any more.
Processes that are started again and again need it by name (`keep`): it is read-only, theirs alone, checked at every
start, and gone with the service. What a service that was killed leaves behind is removed by the next one: a lock that
ends with its process tells whether anybody still uses a copy.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qexport.bundle import Bundle
from qexport.bundle.files import MANIFEST, explain_os_error
from qexport.errors import BundleError, InputError
from qexport.runtime import Runtime, load

try:
    import fcntl
except ImportError:  # Windows: leftovers stay
    fcntl = None

PREFIX = "qexport-serve-"
LOCK = "lock"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def name_of(path: str | Path) -> str:
    """What a bundle is called where several are served: the name of its folder."""
    return Path(path).resolve().name


def load_private(path: str | Path, provider: str = "auto", threads: int | None = None) -> Runtime:
    """A runtime of the bundle at `path` that is independent of the files there.

    Every hash is checked twice: of the original, so that an error names the file to mend, and of the copy, which is
    what runs. The copy lies in the folder for temporary files (``TMPDIR``) and takes its space until the process ends.

    Raises:
        BundleError: the bundle is damaged, or changed while it was copied.
        InputError: no bundle there, no room for the copy, or the provider cannot be used.
    """
    original = Bundle.open(path)
    with _explained(path), _folder() as folder:
        copy = _copy(original, folder)
        with _naming(copy, original.path):
            return load(copy, provider=provider, threads=threads)


@contextlib.contextmanager
def keep(path: str | Path) -> Iterator[Bundle]:
    """A checked copy of the bundle at `path` that lasts as long as the context, for processes to load.

    Raises:
        As `load_private`, but for the provider.
    """
    with contextlib.ExitStack() as stack:
        with _explained(path):
            original = Bundle.open(path)
            folder = stack.enter_context(_folder())
            copy = _copy(original, folder)
            with _naming(copy, original.path):
                kept = Bundle.open(copy)
            for name in (MANIFEST, *original.manifest.files):
                (copy / name).chmod(0o400)
        yield kept


def remove_leftovers() -> list[Path]:
    """Remove copies that no living process holds; returns their folders."""
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("r+b") as lock:  # not ours, or gone meanwhile
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A new folder, locked for as long as it is there."""
    # Where an open file cannot be removed (Windows) the folder stays behind.
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True))
        lock = stack.enter_context((Path(name) / LOCK).open("wb"))
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(name)


def _copy(original: Bundle, folder: Path) -> Path:
    copy = folder / "bundle"
    for name in (MANIFEST, *original.manifest.files):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original.path / name, target)
    return copy


@contextlib.contextmanager
def _naming(copy: Path, original: Path) -> Iterator[None]:
    """Let errors about the copy speak of the original."""
    try:
        yield
    except BundleError as error:
        if str(copy) in str(error):
            text = str(error).replace(str(copy), str(original))
            raise BundleError(f"{text} (in the copy that was to be served)") from error
        raise


@contextlib.contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            error.filename = None  # shutil names the file that was read, but the other one does not fit
        explained = explain_os_error(error, Path(tempfile.gettempdir()))
        raise explained or InputError(f"{error.filename or path}: {error.strerror}") from error
