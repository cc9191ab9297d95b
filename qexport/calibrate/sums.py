"""Sums over the inputs of a layer, row by row, whatever their number.

Shape suffixes: T rows (tokens, or places that a convolution's window stands on), I inputs of the layer as a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.numerics.statistics import InputStatistics
from qexport.reference import Window

_ROWS = 1 << 14
"""Rows multiplied at once: a float32 product sums that many terms before float64 takes over, so its relative error
stays near √2¹⁴ · 2⁻²⁴ = 8e-6 of the diagonal at worst, far below what the sampled inputs differ by."""


class InputSums:
    """Accumulates what `InputStatistics` holds."""

    def __init__(self, width: int) -> None:
        """Start with nothing, for a layer with so many inputs."""
        self.count = 0
        self._gram_II = torch.zeros((width, width), dtype=torch.float64)
        self._least_I = torch.full((width,), torch.inf)
        self._greatest_I = torch.full((width,), -torch.inf)
        self._abs_sum_I = torch.zeros(width, dtype=torch.float64)

    def add(self, x_TI: Tensor) -> None:
        """Take more rows, float32."""
        for rows in x_TI.split(_ROWS):
            magnitude = rows.abs()
            self.count += len(rows)
            self._gram_II += rows.T @ rows
            self._abs_sum_I += magnitude.sum(dim=0, dtype=torch.float64)
            least, greatest = torch.aminmax(rows, dim=0)  # they hand on a NaN, and so do minimum and maximum
            self._least_I = torch.minimum(self._least_I, least)
            self._greatest_I = torch.maximum(self._greatest_I, greatest)

    def constant(self) -> npt.NDArray[np.bool_]:
        """Which channels (I,) were one and the same value, other than zero, in every row."""
        return ((self._least_I == self._greatest_I) & (self._least_I != 0)).numpy()

    def statistics(self) -> InputStatistics:
        """The sums so far; `InputStatistics.check` says whether they can be used."""
        mean = self._abs_sum_I / max(self.count, 1)
        absmax_I = torch.maximum(-self._least_I, self._greatest_I).clamp(min=0)  # of no row: 0
        return InputStatistics(self.count, self._gram_II.numpy(), absmax_I.numpy(), mean.numpy().astype(np.float32))


def rows_of(x: Tensor, kernel: tuple[int, ...], window: Window | None, layer: str) -> Iterator[Tensor]:
    """The rows (T, I) that a layer multiplies by its weight as a matrix, a part of the batch at a time.

    `kernel` is the weight's shape after outputs and inputs: () for a matrix, (height, width) for a convolution.

    Raises:
        UnsupportedError: a convolution in groups, whose weight is no single matrix.
    """
    if window is None:
        yield x.reshape(-1, x.shape[-1])
        return
    if window.groups != 1:
        raise UnsupportedError(f"{layer}: convolutions in groups cannot be calibrated; keep it in floating point")
    padding = _padding(window, kernel)
    for image in x.split(1):
        padded = F.pad(image, padding)
        columns_1IT = F.unfold(padded, kernel, dilation=window.dilation, stride=window.stride)
        yield columns_1IT[0].T


def _padding(window: Window, kernel: tuple[int, ...]) -> list[int]:
    """As `F.pad` takes it: left, right, top, bottom."""
    if window.padding == "valid":
        return [0, 0, 0, 0]
    dilation = (window.dilation,) * 2 if isinstance(window.dilation, int) else tuple(window.dilation)
    if window.padding == "same":
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    height, width = (window.padding,) * 2 if isinstance(window.padding, int) else tuple(window.padding)
    return [width, width, height, height]
