"""Images to train on: coloured gradients, as JPEG bytes in the layout of the reference data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = 10


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images, two of a class; a class has a colour and a direction of its own."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 32)
    files, labels = [], []
    for number in range(2 * CLASSES):
        label = number % CLASSES
        colour = rng.uniform(40, 215, 3) + label
        plane = ramp[:, None] if label % 2 else ramp[None, :]
        pixels = np.clip(colour * (0.4 + 0.6 * np.broadcast_to(plane, (32, 32)))[..., None], 0, 255)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
        labels.append(label)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, data=np.concatenate(files), off=offsets.astype(np.int64), lab=np.array(labels, np.uint8))
    return path
