"""CIFAR-10 as it is distributed, made into the .npz files that the commands here read.

    python benchmarks/cifar_npz.py cifar-10-batches-py/test_batch --out cifar_test.npz
    python benchmarks/cifar_npz.py cifar-10-batches-py/data_batch_* --out cifar_train.npz

Input are the files of "CIFAR-10 python version" (https://www.cs.toronto.edu/~kriz/cifar.html; Krizhevsky 2009,
"Learning multiple layers of features from tiny images"): pickles of a dict with ``data`` uint8 (n, 3072), red, green
and blue planes of 32 × 32 one after another, and ``labels``. They are read by an unpickler that knows NumPy's arrays
and nothing else, so a file that would run something is refused.

Output is, in the order of classes and within a class in the order of the input, either

- ``data``, ``off``, ``lab``: JPEG files one after another, 4:2:0 at Pillow's quality 75. That is what the files are
  that figures here were measured on. Theirs came from another copy of CIFAR-10, whose order within a class is not on
  record; so which images are "every 20th" may differ, and with them figures, as much as by another sample of images.
- with ``--pixels``: ``images`` (n, 32, 32, 3) and ``labels``, the pixels as they are, better to train on.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE, PLANES = 32, 3
QUALITY = 75
KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip
"""What a pickle of arrays and lists names."""


class Unpickler(pickle.Unpickler):
    """Reads arrays, lists, numbers and text."""

    def find_class(self, module: str, name: str) -> Any:
        """Raise `pickle.UnpicklingError` for whatever an array does not need."""
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"names {module}.{name}, which no array of images needs")
        return super().find_class(module, name)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 32, 32, 3) uint8 and labels (n,) uint8 of one file.

    Raises:
        SystemExit: it is not such a file.
    """
    try:
        with path.open("rb") as file:
            content = Unpickler(file, encoding="bytes").load()
        # The files were written by Python 2, whose text reads as bytes.
        found = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        planes, labels = np.asarray(found["data"]), np.asarray(found["labels"])
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, KeyError, ValueError) as error:
        raise SystemExit(f"{path}: no batch of CIFAR-10 in its python version ({error})") from error
    if planes.dtype != np.uint8 or planes.shape != (len(labels), PLANES * SIDE * SIDE) or labels.ndim != 1:
        raise SystemExit(f"{path}: data are {planes.dtype} {planes.shape} for {len(labels)} labels")
    return planes.reshape(-1, PLANES, SIDE, SIDE).transpose(0, 2, 3, 1), labels.astype(np.uint8)


def by_class(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, class after class."""
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


def encoded(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``data`` (bytes,) uint8 and ``off`` (n + 1,) int64; see module."""
    files = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    off = np.concatenate([[0], np.cumsum([len(file) for file in files])]).astype(np.int64)
    return np.concatenate(files), off


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, sort, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", nargs="+", type=Path, help="test_batch, or data_batch_1 … data_batch_5")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--pixels", action="store_true", help="pixels as they are, instead of JPEG")
    asked = parser.parse_args(arguments)
    images, labels = by_class([read_batch(path) for path in asked.batches])
    if asked.pixels:
        np.savez_compressed(asked.out, images=images, labels=labels)
    else:
        data, off = encoded(images)
        np.savez(asked.out, data=data, off=off, lab=labels)
    print(f"wrote {asked.out}: {len(labels)} images, {len(np.unique(labels))} classes")


if __name__ == "__main__":
    main()
