"""Images for training: decoded once, mirrored half of the time, in an order that depends on seed and step alone.

So a run that is cut off goes on with the very batch, and the very noise, that it would have had next: nothing about
random numbers is stored in a checkpoint.

Legend: N images, B batch, C channels, H W sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SIZE, NUM_CLASSES = 32, 10
_DECODE_BATCH = 1000

_ORDER, _STEP = 0, 1


class Examples:
    """N examples, as they are and mirrored, and their labels (N,) int64.

    `mirrored` is None where mirroring is a flip of the last axis, as it is of images; tokens and latents of mirrored
    images have to be computed from the images.
    """

    def __init__(self, plain: Tensor, labels: Tensor, mirrored: Tensor | None = None) -> None:
        self.plain, self.labels, self.mirrored = plain, labels, mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """What a step sees: (B, …) examples and (B,) labels."""
        places = np.arange(step * size, (step + 1) * size)
        index = torch.from_numpy(
            np.concatenate(
                [
                    self._order(int(epoch), seed)[places[places // len(self) == epoch] % len(self)]
                    for epoch in np.unique(places // len(self))
                ]
            )
        )
        flipped = torch.rand(size, generator=step_generator(seed, 2 * step + 1)) < 0.5
        plain = self.plain[index]
        other = plain.flip(-1) if self.mirrored is None else self.mirrored[index]
        shape = (size, *[1] * (plain.ndim - 1))
        return torch.where(flipped.reshape(shape), other, plain), self.labels[index]

    def in_order(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All examples as they are, for judging."""
        return [(self.plain[i : i + size], self.labels[i : i + size]) for i in range(0, len(self), size)]

    @lru_cache(maxsize=2)  # noqa: B019 - one object lives as long as the run
    def _order(self, epoch: int, seed: int) -> np.ndarray:
        return torch.randperm(len(self), generator=_generator(seed, _ORDER, epoch)).numpy()


def step_generator(seed: int, number: int) -> torch.Generator:
    """A generator of its own for everything that is drawn under this number (even: objectives; odd: mirroring)."""
    return _generator(seed, _STEP, number)


def _generator(seed: int, stream: int, number: int) -> torch.Generator:
    # Seeds that differ in few bits give related Mersenne states, so they are hashed.
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def read_images(path: Path) -> tuple[Examples, str]:
    """All images of a file or folder (`qexport.verify.images` says of which layouts), and a digest of them.

    Raises:
        InputError: they cannot be read, are not 32 × 32, or their labels are not 0 … 9.
    """
    from qexport.verify.images import open_images

    images = open_images(path, size=IMAGE_SIZE, num_classes=NUM_CLASSES)
    parts = [
        np.rint(pixels * 255).astype(np.uint8)  # the reader divides; x/255·255 is x again to 1e-7
        for pixels, _ in images.batches(_DECODE_BATCH)
    ]
    pixels_NCHW = np.concatenate(parts)
    digest = hashlib.sha256(pixels_NCHW.tobytes() + images.labels.tobytes()).hexdigest()
    return Examples(torch.from_numpy(pixels_NCHW), torch.from_numpy(images.labels)), digest


def to_unit(pixels_BCHW: Tensor) -> Tensor:
    """uint8 pixels → float32 in [−1, 1]."""
    return pixels_BCHW.float() / 127.5 - 1


@torch.no_grad()
def prepared(
    images: Examples, encode: Callable[[Tensor], Tensor], size: int, done: Callable[[int, int], None] | None = None
) -> Examples:
    """What frozen `encode` makes of the images and of their mirror images; `done` is told (done, in all)."""
    sides: list[Tensor] = []
    for mirrored in (False, True):
        parts = []
        for pixels, _ in images.in_order(size):
            parts.append(encode(pixels.flip(-1) if mirrored else pixels).cpu())
            if done is not None:
                done(len(images) * mirrored + sum(map(len, parts)), 2 * len(images))
        sides.append(torch.cat(parts))
    return Examples(sides[0], images.labels, sides[1])
