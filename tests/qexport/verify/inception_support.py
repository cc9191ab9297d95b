"""A stand-in for Inception, and images to score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qexport.verify.inception import FEATURES, LOGITS


class Stand:
    """Random projections of the pixels of 4 × 4 images: as many features and logits as Inception has."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.features = torch.randn(48, FEATURES, generator=generator)
        self.logits = torch.randn(48, LOGITS, generator=generator) / 4

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (3, 4, 4)
        x = pixels.flatten(1).float() / 128 - 1
        return x @ self.features, x @ self.logits


def blocks(count: int, seed: int, tint: tuple[float, float, float], size: int = 4, detail: int = 4) -> np.ndarray:
    """Images (count, size, size, 3) uint8 of `detail` × `detail` blocks in random colours, each channel × its tint."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, detail, detail, 3)) * tint
    return coarse.repeat(size // detail, axis=1).repeat(size // detail, axis=2).astype(np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder
