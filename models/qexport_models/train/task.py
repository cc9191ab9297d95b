"""What a trainer needs to know of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

LOSS = "loss"
"""The term of `Task.terms` that is minimised; the others are what it is made of, for the log."""


class Task(Protocol):
    """A model and its objective. The module's mode decides: labels are dropped, images cropped, only in training."""

    @property
    def module(self) -> nn.Module:
        """What is trained and written."""
        ...

    def frozen(self) -> list[nn.Module]:
        """Modules that the objective needs, to be moved to the device."""
        ...

    def encode(self, pixels_BCHW: Tensor) -> Tensor | None:
        """What `terms` sees of uint8 images, computed once before training; None: the images themselves."""
        ...

    def terms(self, x: Tensor, labels_B: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Scalars by name, `LOSS` among them; `rng` is on the CPU."""
        ...

    def after(self, step: int, rng: torch.Generator) -> None:
        """Called after every update."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What has to be stored beside weights and optimiser."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` back."""
        ...

    def metadata(self, examples: Tensor) -> dict[str, str]:
        """What to write beside the weights; `examples` are some of the training images, uint8."""
        ...


class PlainTask:
    """An objective on images without a state of its own."""

    def frozen(self) -> list[nn.Module]:
        """See `Task`."""
        return []

    def encode(self, pixels_BCHW: Tensor) -> Tensor | None:
        """See `Task`."""
        del pixels_BCHW
        return None

    def after(self, step: int, rng: torch.Generator) -> None:
        """See `Task`."""

    def state(self) -> dict[str, Tensor]:
        """See `Task`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Task`."""

    def metadata(self, examples: Tensor) -> dict[str, str]:
        """See `Task`."""
        del examples
        return {}


def drop_labels(labels_B: Tensor, share: float, null: int, rng: torch.Generator) -> Tensor:
    """A `share` of the labels replaced by the null class, which guidance subtracts (arXiv:2207.12598, algorithm 1)."""
    dropped_B = torch.rand(len(labels_B), generator=rng) < share
    return torch.where(dropped_B.to(labels_B.device), null, labels_B)
