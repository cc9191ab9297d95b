"""Resizing of token maps as constant matrices.

Bicubic up-sampling (a = −0.75, half-pixel centres, edges clamped) and area down-sampling are linear and separable, so
a whole resize is one matrix: the Kronecker product of the 1-D matrix with itself. As an initialiser and a MatMul it is
exact to float32 rounding and as fast as any kernel, where the exporter's own forms fail on dynamic sizes.
"""

from __future__ import annotations

import math

import numpy as np

CUBIC_A = -0.75  # torch.nn.functional.interpolate(mode="bicubic")


def _cubic(distance: float) -> float:
    """Keys' cubic convolution kernel (Keys 1981, eq. 15 with free parameter a)."""
    d, a = abs(distance), CUBIC_A
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def bicubic_up_1d(source: int, target: int) -> np.ndarray:
    """(target, source) float64 matrix that resizes a line of `source` samples to `target` ≥ `source`."""
    matrix = np.zeros((target, source))
    if source == target:
        return np.eye(source)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        base = math.floor(centre)
        for tap in range(base - 1, base + 3):
            matrix[row, min(max(tap, 0), source - 1)] += _cubic(centre - tap)
    return matrix


def area_down_1d(source: int, target: int) -> np.ndarray:
    """(target, source) float64 matrix of adaptive average pooling: bin i covers ⌊i·s/t⌋ … ⌈(i+1)·s/t⌉."""
    matrix = np.zeros((target, source))
    for row in range(target):
        start, stop = row * source // target, -(-(row + 1) * source // target)
        matrix[row, start:stop] = 1 / (stop - start)
    return matrix


def plane(line: np.ndarray) -> np.ndarray:
    """(t·t, s·s) float32 matrix over flattened square maps from the (t, s) matrix of one axis."""
    return np.kron(line, line).astype(np.float32)
