"""Quantisation algorithms: pure functions from a weight to codes and scales. One file each, one line in the table."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from qexport.algorithms.rtn import rtn
from qexport.errors import InputError
from qexport.numerics.quantized import QuantizedTensor
from qexport.scheme import TensorSpec
from qexport.suggest import nearest


class Algorithm(Protocol):
    """What every algorithm is: a function without state and without randomness."""

    def __call__(self, w_OI: npt.NDArray[np.float32], spec: TensorSpec, *, name: str = "weight") -> QuantizedTensor:
        """Quantise one weight (outputs, inputs) float32 as `spec` says; `name` is for messages."""
        ...


ALGORITHMS: dict[str, Algorithm] = {"rtn": rtn}
"""Every algorithm by the name that recipes and `--method` use."""


def get_algorithm(name: str) -> Algorithm:
    """The algorithm called `name`.

    Raises:
        InputError: no such algorithm; the message suggests the nearest names and lists all.
    """
    if name not in ALGORITHMS:
        raise InputError(f"unknown method {name!r}{nearest(name, ALGORITHMS)}; known are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
