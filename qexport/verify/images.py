"""Real images as input: an .npz file, or a folder with one subfolder for each class.

Of an .npz, two layouts are read:

- ``images`` uint8 (n, H, W, 3) and ``labels`` (n,) integers
- ``data`` uint8, JPEG (or PNG) files one after another; ``off`` int64 (n + 1,) where each begins and the last ends;
  ``lab`` (n,) integers

In a folder, subfolders in order of name are the classes 0, 1, 2 …, and files in them are images that Pillow can read.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from qexport.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, decoded when they are needed.

    `load(i)` gives image i as uint8 (H, W, 3); `labels` is (n,) int64; `source` says where they come from. `check(i)`
    raises what `load(i)` would, as far as the file's header and end tell, and decodes no pixels of a sound one.
    """

    load: Callable[[int], np.ndarray]
    labels: np.ndarray
    source: str
    check: Callable[[int], object] = lambda i: None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pixels (b, 3, H, W) float32 in [0, 1] and labels (b,), at most `batch` at a time."""
        for start in range(0, len(self), batch):
            stop = min(start + batch, len(self))
            pixels = np.stack([self.load(i) for i in range(start, stop)])
            yield np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 255, self.labels[start:stop]


def open_images(path: str | Path, *, size: int, num_classes: int, every: int = 1) -> ImageSet:
    """Open images for a model.

    Args:
        path: an .npz file or a folder; see the module.
        size: side in pixels that the model takes; images of another size are refused.
        num_classes: labels must be below this.
        every: take image 0, `every`, 2·`every` …

    Raises:
        InputError: there is nothing there, it is not one of the layouts, or an image or a label does not fit.
    """
    where = Path(path)
    if every < 1:
        raise InputError(f"every {every}th image: must be at least 1")
    if not where.exists():
        raise InputError(f"{where}: no such file or folder")
    images = _folder(where) if where.is_dir() else _npz(where)
    labels = images.labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{where}: labels are {labels.dtype} {labels.shape}; they must be integers (n,)")
    if not len(labels):
        raise InputError(f"{where}: holds no images")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{where}: labels reach from {labels.min()} to {labels.max()}; this model has 0 … {num_classes - 1}"
        )
    chosen = np.arange(0, len(labels), every)
    source = f"{len(chosen)} images of {where.name}" + (f", every {every}th" if every > 1 else "")

    def require_size(i: int, width: int, height: int) -> None:
        if (width, height) != (size, size):
            raise InputError(f"{where}: image {chosen[i]} is {width}×{height}; this model takes {size}×{size}")

    def load(i: int) -> np.ndarray:
        pixels = images.load(int(chosen[i]))
        require_size(i, pixels.shape[1], pixels.shape[0])
        return pixels

    def check(i: int) -> None:
        require_size(i, *images.size_of(int(chosen[i])))

    return ImageSet(load, labels[chosen].astype(np.int64), source, check)


@dataclass(frozen=True)
class _Files:
    """Images of any size as they lie there: `load` decodes one, `size_of` tells (width, height) without."""

    load: Callable[[int], np.ndarray]
    size_of: Callable[[int], tuple[int, int]]
    labels: np.ndarray
    source: str

    @classmethod
    def encoded(cls, file: Callable[[int], Path | io.BytesIO], what: Callable[[int], str], *rest: Any) -> _Files:
        return cls(lambda i: decode(file(i), what(i)), lambda i: encoded_size(file(i), what(i)), *rest)


def _folder(root: Path) -> _Files:
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise InputError(f"{root}: has no subfolders; one for each class is needed")
    found = [(p, i) for i, c in enumerate(classes) for p in sorted(c.iterdir()) if p.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"{root}: no images in its subfolders ({', '.join(SUFFIXES)})")
    files = [p for p, _ in found]
    labels = np.array([label for _, label in found])
    return _Files.encoded(lambda i: files[i], lambda i: str(files[i]), labels, root.name)


def _npz(path: Path) -> _Files:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path}: a single array; an .npz with images and labels is needed")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        kind = type(error).__name__
        raise InputError(f"{path}: cannot be read as .npz ({kind}); give an .npz or a folder") from error
    if {"images", "labels"} <= set(arrays):
        images = arrays["images"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(arrays["labels"]):
            raise InputError(
                f"{path}: images are {images.dtype} {images.shape}; they must be uint8 (n, H, W, 3), one a label"
            )
        size = (images.shape[2], images.shape[1])
        return _Files(lambda i: images[i], lambda i: size, arrays["labels"], path.name)
    if {"data", "off", "lab"} <= set(arrays):
        data, off, labels = arrays["data"], arrays["off"], arrays["lab"]
        good = off.ndim == 1 and len(off) in (len(labels), len(labels) + 1) and data.dtype == np.uint8
        if not good or (np.diff(off) < 0).any() or (len(off) and (off[0] < 0 or off[-1] > data.size)):
            raise InputError(f"{path}: 'off' does not cut 'data' into {len(labels)} files")
        ends = off[1:] if len(off) > len(labels) else np.append(off[1:], data.size)
        return _Files.encoded(
            lambda i: io.BytesIO(data[off[i] : ends[i]].tobytes()), lambda i: f"{path}: image {i}", labels, path.name
        )
    raise InputError(
        f"{path}: holds {', '.join(arrays) or 'nothing'}; needed are images and labels, or data, off and lab"
    )


def decode(file: Path | io.BytesIO, what: str) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an encoded image.

    Raises:
        InputError: it is none; names it as `what`.
    """
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise _unreadable(what, error) from error


_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
"""What whole files end with; where something follows, or in other formats, only decoding tells."""


def encoded_size(file: Path | io.BytesIO, what: str) -> tuple[int, int]:
    """(width, height) of an encoded image, from its header; it is decoded only if it does not end as whole files do.

    Raises:
        InputError: it is none, or is cut short; names it as `what`.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else file as handle, Image.open(handle) as image:
            end = _ENDS.get(image.format or "", b"")
            handle.seek(-max(len(end), 1), io.SEEK_END)
            whole = bool(end) and handle.read() == end
            handle.seek(0)
            if not whole:
                with Image.open(handle) as again:
                    again.load()
            return image.size
    except (UnidentifiedImageError, OSError) as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: Exception) -> InputError:
    return InputError(f"{what}: not an image that can be read ({type(error).__name__})")
