"""Writing a bundle: all or nothing.

Everything is written into a hidden sibling of the destination, on the same file system, and renamed into place when it
is complete and on the disk. Whoever looks at the destination sees no bundle, the old one, or the new one.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from qexport.bundle.files import (
    MANIFEST,
    WEIGHTS,
    check_relative,
    explain_os_error,
    in_reports,
    sha256_file,
    sync_file,
    sync_folder,
    walk,
)
from qexport.bundle.manifest import FileEntry, Manifest
from qexport.bundle.reader import read_manifest
from qexport.bundle.weights import WeightFileWriter
from qexport.errors import InputError
from qexport.hidden import partial_of


class BundleWriter:
    """Context manager that writes one bundle to the folder `out`.

    Inside the block write files below `path` (and tensors through `weights`), then call `finish`. Leaving the block
    without it, by an error or an interrupt, removes everything that was written.

    Raises:
        InputError: the destination is taken, the disk is full, or the file system is read-only.
    """

    def __init__(self, out: str | Path, overwrite: bool = False) -> None:
        """Nothing touches the disk before the block is entered."""
        # Path.resolve would follow a link at the destination, which is then not seen to be one.
        self.out = Path(os.path.abspath(out))  # noqa: PTH100
        self.path = self.out
        self._overwrite = overwrite
        self._weights: WeightFileWriter | None = None
        self._finished = False

    def __enter__(self) -> BundleWriter:
        try:
            self._check_destination()
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.path = self._make_partial()
        except OSError as error:
            raise self._explained(error) from error
        return self

    @property
    def weights(self) -> WeightFileWriter:
        """The weight file of the bundle, created at first use."""
        if self._weights is None:
            self._weights = WeightFileWriter(self.path / WEIGHTS)
        return self._weights

    def write(self, relative: str, data: bytes) -> Path:
        """Write one small file, folders included."""
        path = self.path / check_relative(relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def finish(self, manifest: Manifest) -> Manifest:
        """Hash every file, write the manifest, and move the bundle into place.

        Returns:
            The manifest with `files` filled in, as it was written.
        """
        self._close_weights()
        files = {
            name: FileEntry(self._hash(self.path / name), status.st_size)
            for name, status in walk(self.path)
            if not in_reports(name)
        }
        manifest = replace(manifest, files=files)
        sync_file(self.write(MANIFEST, manifest.dumps()))
        for folder in {p.parent for p in self.path.rglob("*")}:
            sync_folder(folder)
        self._publish()
        self._finished = True
        sync_folder(self.out.parent)
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            try:
                self._close_weights()  # flushes, which fails once more on a full disk
            except OSError as flush_error:
                error = error or flush_error
            finally:
                shutil.rmtree(self.path, ignore_errors=True)
            if error is None:
                raise RuntimeError("BundleWriter: the block ended without finish()")
        if isinstance(error, OSError):
            raise self._explained(error) from error

    def _hash(self, path: Path) -> str:
        """SHA-256 of a file that is complete, and on the disk afterwards."""
        sync_file(path)
        weights = self._weights
        return weights.sha256 if weights is not None and weights.path == path else sha256_file(path)

    def _close_weights(self) -> None:
        if self._weights is not None:
            self._weights.close()

    def _explained(self, error: OSError) -> Exception:
        return explain_os_error(error, self.out) or error

    def _make_partial(self) -> Path:
        # A process that was killed leaves its folder behind, and in containers the next one has the same id.
        for attempt in range(1000):
            path = partial_of(self.out, attempt)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
        raise InputError(f"{self.out.parent}: too many folders .{self.out.name}.partial-*; delete them")

    def _check_destination(self) -> None:
        """Refuse a destination that holds anything but an empty folder or a bundle that may be overwritten."""
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink() or not self.out.is_dir():
            raise InputError(f"{self.out}: exists and is not a folder; choose another --out")
        if not any(self.out.iterdir()):
            return
        try:
            listed = read_manifest(self.out).files
            foreign = [n for n, _ in walk(self.out) if n not in listed and n != MANIFEST and not in_reports(n)]
        except InputError as error:
            raise InputError(f"{self.out}: exists and is no intact bundle; choose another --out") from error
        if foreign:
            raise InputError(f"{self.out}: holds {foreign[0]}, which is not part of a bundle; choose another --out")
        if not self._overwrite:
            raise InputError(f"{self.out}: exists; choose another --out, or pass --overwrite")

    def _publish(self) -> None:
        self._check_destination()  # it may have come into being meanwhile
        if not self.out.exists():
            self.path.rename(self.out)
            return
        old = self.path.with_name(self.path.name.replace(".partial-", ".old-"))
        try:
            self.out.rename(old)
            self.path.rename(self.out)
        except BaseException:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
            raise
        finally:
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
