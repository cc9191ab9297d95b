"""Opening a bundle: everything is checked before anything is used.

The paths that .onnx files themselves name for their external data are not read here (that would need onnx): onnxruntime
refuses absolute ones and those that leave the bundle, and `qexport.runtime.session` pins the folder it allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from qexport.bundle.files import MANIFEST, REPORTS, WEIGHTS, check_relative, in_reports, sha256_file, walk
from qexport.bundle.manifest import Manifest
from qexport.errors import BundleError, InputError
from qexport.plan import DTYPES, Plan, Table

MAX_MANIFEST_BYTES = 256 * 1024 * 1024
"""A manifest larger than this is refused unread; one with 10,000 layers and 1,000 steps has about 5 MB."""

_AGAIN = "copy the bundle again or quantise again"


class Bundle:
    """A bundle on disk that passed its checks. Make one with `Bundle.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `Bundle.open`; this checks nothing."""
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, check: Literal["full", "size"] = "full") -> Bundle:
        """Open the bundle in the folder `path`.

        Args:
            path: the folder with ``manifest.json``.
            check: ``"full"`` hashes every file (about 1 s per GB); ``"size"`` compares sizes only.

        Raises:
            BundleError: a file is missing, truncated, altered, not listed, or leads out of the folder; the manifest was
                edited or is of another version. One line that names the file and says what to do.
            InputError: there is nothing at `path`, or it cannot be read.
        """
        root = Path(path)
        manifest = read_manifest(root)
        try:
            _check_files(root, manifest, hashes=check == "full")
        except OSError as error:
            raise InputError(f"{error.filename or root}: cannot be read ({error.strerror})") from error
        _check_references(root, manifest)
        return cls(root, manifest)

    @classmethod
    def newest(cls, under: str | Path = "qexport-out") -> Path:
        """The bundle directly below `under` whose manifest was written last. It is not opened.

        Raises:
            InputError: there is none.
        """
        found = [(m.stat().st_mtime_ns, m.parent.name, m.parent) for m in Path(under).glob(f"[!.]*/{MANIFEST}")]
        if not found:
            raise InputError(f"no bundle under {under}; name one, or make one with `qexport quantize`")
        return max(found)[2]

    @property
    def plan(self) -> Plan:
        """The sampling plan."""
        return self.manifest.plan

    @property
    def reports(self) -> Path:
        """The folder for reports, which is outside the hashes; it may not exist yet."""
        return self.path / REPORTS

    @property
    def size_bytes(self) -> int:
        """Size of all listed files."""
        return sum(entry.size for entry in self.manifest.files.values())

    def graph_files(self, target: str | None = None) -> dict[str, Path]:
        """Path of each graph that the plan calls: of the portable one, or of what `target` has in its place.

        Raises:
            InputError: the bundle was not lowered to that target.
        """
        if target is not None and target not in self.manifest.targets:
            known = ", ".join(self.manifest.targets) or "none"
            raise InputError(f"{self.path}: not lowered to {target!r} (lowered to: {known}); run `qexport lower`")
        graphs = {**self.manifest.graphs, **(self.manifest.targets[target] if target else {})}
        return {name: self.path / graphs[name] for name in self.plan.graphs}

    def table(self, name: str) -> np.ndarray:
        """A constant tensor of the plan, read-only and mapped into memory.

        Raises:
            KeyError: the plan has no such table.
        """
        table = self.plan.tables[name]
        dtype = np.dtype(table.dtype).newbyteorder("<")
        if table.nbytes == 0:
            return np.zeros(table.shape, dtype)
        # np.memmap reads a shape of () as one dimension, so map flat and reshape.
        flat = np.memmap(self.path / WEIGHTS, dtype, "r", table.offset, (math.prod(table.shape),))
        return np.asarray(flat).reshape(table.shape)

    def tables(self) -> dict[str, np.ndarray]:
        """All constant tensors of the plan, as `table` gives them."""
        return {name: self.table(name) for name in self.plan.tables}


def read_manifest(root: Path) -> Manifest:
    """Read and check the manifest alone.

    Raises:
        BundleError: it is no manifest, or a damaged one, or of another version.
        InputError: there is no bundle at `root`.
    """
    path = root / MANIFEST
    try:
        if not root.exists():
            raise InputError(f"{root}: no such folder; a bundle is the folder that `qexport quantize` writes")
        if not root.is_dir():
            hint = f"; did you mean {root.parent}?" if root.name == MANIFEST else ""
            raise InputError(f"{root}: a file, not a bundle; give the folder with {MANIFEST}{hint}")
        if not path.is_file():
            raise InputError(f"{root}: not a bundle (no {MANIFEST}); a bundle is what `qexport quantize` writes")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest of qexport")
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    try:
        return Manifest.loads(text)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error


def _check_files(root: Path, manifest: Manifest, hashes: bool) -> None:
    for listed in manifest.files:
        check_relative(listed)
        if listed == MANIFEST or in_reports(listed):
            raise BundleError(f"{root / MANIFEST}: lists {listed!r}, which cannot be hashed; quantise again")
    found = {name: status.st_size for name, status in walk(root) if name != MANIFEST and not in_reports(name)}
    for name in found:
        if name not in manifest.files:
            raise BundleError(f"{root / name}: not part of the bundle; move it away (reports/ may hold anything)")
    for name, entry in manifest.files.items():
        if name not in found:
            raise BundleError(f"{root / name}: missing; {_AGAIN}")
        if found[name] != entry.size:
            what = "truncated" if found[name] < entry.size else "too long"
            raise BundleError(f"{root / name}: {what}: {found[name]} bytes of {entry.size}; {_AGAIN}")
    if hashes:
        for name, entry in manifest.files.items():
            if sha256_file(root / name) != entry.sha256:
                raise BundleError(f"{root / name}: altered (its SHA-256 is not the one in the manifest); {_AGAIN}")


def _check_references(root: Path, manifest: Manifest) -> None:
    for graphs in (manifest.graphs, *manifest.targets.values()):
        for name, file in graphs.items():
            if file not in manifest.files:
                raise BundleError(f"{root / MANIFEST}: graph {name!r} is in unlisted file {file!r}; quantise again")
    for name in manifest.plan.graphs:
        if name not in manifest.graphs:
            raise BundleError(f"{root / MANIFEST}: the plan calls graph {name!r}, which is missing; quantise again")
    _check_tables(root, manifest.plan.tables, manifest.files[WEIGHTS].size if WEIGHTS in manifest.files else 0)


def _check_tables(root: Path, tables: Mapping[str, Table], weights_bytes: int) -> None:
    for name, table in tables.items():
        numbers = (table.offset, table.nbytes, *table.shape)
        good = (
            table.dtype in DTYPES
            and all(isinstance(n, int) and n >= 0 for n in numbers)
            and table.nbytes == math.prod(table.shape) * np.dtype(table.dtype).itemsize
            and table.offset + table.nbytes <= weights_bytes
        )
        if not good:
            raise BundleError(f"{root / MANIFEST}: table {name!r} does not lie within {WEIGHTS}; quantise again")
