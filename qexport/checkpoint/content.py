"""What a file is, told from its bytes; everything that can be refused before its format's own reader sees it.

A torch file is a zip archive of stored (never compressed) entries, one per tensor, and a pickle that says how they
belong together; before torch 1.6 it was a stream of pickles that begins with a magic number. A safetensors file is
the length of a JSON header (8 bytes, little endian), the header, and the tensors.
"""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path

from qexport.errors import CheckpointError

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""Protocol 2 pickle of torch's magic number 0x1950a86a20f9469cfc6c."""

MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_PICKLE_BYTES = 64 << 20
"""Of the pickle in a torch file. That of a model with a thousand tensors and its optimiser takes one or two MB."""

_CLUES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; run `git lfs pull`"),
    (b"<", "is a web page, not weights; the download failed"),
    (b"\x80", "is a bare pickle, which may run code when opened; save the state dict with torch.save or safetensors"),
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"\x93NUMPY", "is a NumPy array, not a checkpoint"),
    (b"\x89HDF", "is an HDF5 file; save the state dict with torch.save or safetensors"),
    (b"GGUF", "is a GGUF file, which is quantised already"),
    (b"{", "is JSON, but no index of shards (*.index.json)"),
)
_START_BYTES = 64


class Content(Enum):
    """Formats that can be read."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    TORCH_LEGACY = "torch, before 1.6"


def content_of(path: Path) -> Content:
    """The format of a file.

    Raises:
        CheckpointError: none that can be read, or one that is truncated or declares more than it holds.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from error
    if size == 0:
        raise CheckpointError(f"{path}: is empty; the download or copy failed")
    if start.startswith(ZIP_START):
        _check_archive(path, size)
        return Content.TORCH
    if start.startswith(LEGACY_START):
        return Content.TORCH_LEGACY
    if start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        if header > MAX_SAFETENSORS_HEADER_BYTES:
            raise CheckpointError(f"{path}: is not a checkpoint; as safetensors its header would have {header:,} bytes")
        if header > size - 8:
            raise CheckpointError(f"{path}: is truncated; its header has {header:,} bytes, the file {size:,}")
        return Content.SAFETENSORS
    for clue, said in _CLUES:
        if start.startswith(clue):
            raise CheckpointError(f"{path}: {said}")
    raise CheckpointError(f"{path}: is neither a torch file nor safetensors (it begins with {start[:8].hex(' ')})")


def _check_archive(path: Path, size: int) -> None:
    """Refuse a zip archive that is no torch file, is cut off, or would unpack to more than it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # whatever a damaged directory provokes in zipfile
        raise CheckpointError(f"{path}: is truncated or damaged; copy or download it again") from error
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: is a TorchScript archive, which holds code; save model.state_dict() instead")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: is a zip archive, but not one that torch wrote")
    declared = sum(entry.file_size for entry in entries)
    if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: is not a file that torch wrote: its {size:,} bytes would unpack to {declared:,}; not opened"
        )
    pickled = max(entry.file_size for entry, name in zip(entries, names, strict=True) if name == "data.pkl")
    if pickled > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: its pickle has {pickled:,} bytes, beyond any state dict; not opened")
