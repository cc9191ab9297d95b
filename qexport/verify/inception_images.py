"""Images to score, without labels: read a batch at a time, so that 50,000 of them need no memory.

- a folder: every image in it and below it, in order of name
- an .npz with ``arr_0`` (as published sample batches have it) or ``images``: uint8 (n, H, W, 3)
- an .npz with ``data``, ``off`` and ``lab``; see `qexport.verify.images`

Legend: N images, B in a batch; pixels are uint8 (B, H, W, 3).
"""

from __future__ import annotations

import contextlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from qexport.errors import InputError
from qexport.verify.images import SUFFIXES, decode, open_images

ARRAYS = ("arr_0", "images")
"""Members of an .npz that may hold the pixels, the first that is there."""

SAVED = "save them in order: np.savez(FILE, images=pixels)"


@dataclass(frozen=True)
class Pictures:
    """`count` images of one size (height, width); `batches(B)` reads them again each time it is called."""

    count: int
    size: tuple[int, int]
    source: str
    batches: Callable[[int], Iterator[np.ndarray]]


def open_pictures(paths: Sequence[Path]) -> Pictures:
    """The images of several files and folders, one after another.

    Raises:
        InputError: there is nothing there, it cannot be read, or images differ in size.
    """
    if not paths:
        raise InputError("no images; name a folder or an .npz")
    parts = [_open(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.size != parts[0].size:
            raise InputError(f"{path}: images are {_text(part.size)}, those of {paths[0]} {_text(parts[0].size)}")

    def batches(batch: int) -> Iterator[np.ndarray]:
        for part in parts:
            yield from part.batches(batch)

    source = " and ".join(part.source for part in parts)
    return Pictures(sum(part.count for part in parts), parts[0].size, source, batches)


def _open(path: Path) -> Pictures:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return _folder(path) if path.is_dir() else _npz(path)


def _folder(root: Path) -> Pictures:
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise InputError(f"{root}: no images in it ({', '.join(SUFFIXES)})")
    height, width, _ = decode(files[0], str(files[0])).shape

    def batches(batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), batch):
            images = [decode(file, str(file)) for file in files[start : start + batch]]
            for file, image in zip(files[start:], images, strict=False):
                if image.shape[:2] != (height, width):
                    raise InputError(
                        f"{file}: is {_text(image.shape[:2])}, the first of its folder {_text((height, width))}"
                    )
            yield np.stack(images)

    return Pictures(len(files), (height, width), root.name or str(root), batches)


def _npz(path: Path) -> Pictures:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is neither a folder nor an .npz ({type(error).__name__})") from error
    member = next((name for name in ARRAYS if name in names), None)
    if member is not None:
        return _array(path, member)
    if {"data", "off", "lab"} <= names:
        return _encoded(path)
    held = ", ".join(sorted(names)) or "nothing"
    raise InputError(f"{path}: holds {held}; images are uint8 (n, H, W, 3) under {' or '.join(ARRAYS)}")


def _array(path: Path, member: str) -> Pictures:
    with _reading(path), zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as file:
        count, height, width = _header(path, member, file)

    def batches(batch: int) -> Iterator[np.ndarray]:
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open(f"{member}.npy") as file:
            _header(path, member, file)
            for start in range(0, count, batch):
                wanted = (min(batch, count - start), height, width, 3)
                held = file.read(int(np.prod(wanted)))
                if len(held) < np.prod(wanted):
                    raise InputError(f"{path}: ends before image {start + wanted[0]}; copy or download it again")
                yield np.frombuffer(held, np.uint8).reshape(wanted)
            file.read(1)  # at the end the archive's checksum is compared

    return Pictures(count, (height, width), path.name, batches)


def _header(path: Path, member: str, file: IO[bytes]) -> tuple[int, int, int]:
    """Images, height and width that an .npy declares; leaves `file` at the first pixel."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise InputError(f"{path}: {member} is of .npy version {version}; {SAVED}")
    shape, fortran, dtype = readers[version](file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or (fortran and shape[0] > 1):
        order = ", columns first" if fortran else ""
        raise InputError(f"{path}: {member} is {dtype} {shape}{order}; images are uint8 (n, H, W, 3); {SAVED}")
    if not all(shape):
        raise InputError(f"{path}: {member} holds no images")
    return shape[0], shape[1], shape[2]


def _encoded(path: Path) -> Pictures:
    with _reading(path), np.load(path, allow_pickle=False) as file:
        first, end = (int(i) for i in file["off"][:2])
        pixels = decode(io.BytesIO(file["data"][first:end].tobytes()), f"{path}: image 0")
        labels = int(file["lab"].max()) + 1
    images = open_images(path, size=pixels.shape[0], num_classes=labels)

    def batches(batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch):
            yield np.stack([images.load(i) for i in range(start, min(start + batch, len(images)))])

    return Pictures(len(images), pixels.shape[:2], path.name, batches)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a damaged .npz provokes into an `InputError` that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: is damaged ({type(error).__name__}); copy or download it again") from error


def _text(size: tuple[int, ...]) -> str:
    return f"{size[1]}×{size[0]}"
