"""A running mean of what is trained: mean ← decay · mean + (1 − decay) · value after every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qexport.distill import processes


class Average:
    """Holds the means beside the tensors, and exchanges the two for judging."""

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        """Start from the tensors as they are."""
        self._tensors, self._decay = list(tensors), decay
        self.values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors' present values."""
        values, tensors = (list(map(processes.own, held)) for held in (self.values, self._tensors))  # some may be parts
        torch._foreach_lerp_(values, tensors, 1 - self._decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange values and means; a second time undoes it."""
        for tensor, value in zip(self._tensors, self.values, strict=True):
            kept = tensor.clone()
            tensor.copy_(value)
            value.copy_(kept)
