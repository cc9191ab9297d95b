"""Weights from a hash, as the fixtures' JSON files define them: however large the model, no state dict is stored.

base = first 8 bytes of sha256("seed/key"), little endian
x_i  = splitmix64 finaliser of base + (i + 1)·0x9E3779B97F4A7C15 mod 2⁶⁴
u_i  = ((x_i >> 40) − 2²³) / 2²³, exact in float32, in [−1, 1)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20
"""Elements at a time: the 64-bit intermediates stay in the cache."""

F32 = NDArray[np.float32]
Rule = Sequence[Any]
"""(regular expression, [kind, numbers …])."""


def unit(seed: int, key: str, n: int) -> F32:
    """`n` numbers in [−1, 1), float32, a function of `seed` and `key` only."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")
    out = np.empty(n, dtype=np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        x = np.arange(start + 1, stop + 1, dtype=np.uint64)
        x *= np.uint64(0x9E3779B97F4A7C15)  # wraps, as it must
        x += np.uint64(base)
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        x >>= np.uint64(40)
        out[start:stop] = (x.astype(np.int64) - (1 << 23)).astype(np.float32) / np.float32(1 << 23)
    return out


def fill(seed: int, key: str, shape: Sequence[int], rules: Sequence[Rule], prefix: str = "") -> F32 | None:
    """The tensor called `key`, float32, or None where the constructor's value is to be kept.

    The first rule whose expression is found in `key` decides: ``fan g`` is ±g·√(3/fan-in), ``amp a [offset]`` is ±a
    around the offset, ``norm a`` is ±a around one. Without one, matrices are ``fan 1`` and vectors ``amp 0.05``.
    `prefix` belongs to the key that is hashed, not to the one that is matched.
    """
    shape = tuple(shape)
    fallback = ["fan", 1.0] if len(shape) >= 2 else ["amp", 0.05]
    kind, *numbers = next((rule for expression, rule in rules if re.search(expression, key)), fallback)
    if kind == "keep":
        return None
    if kind == "fan":
        amp, offset = numbers[0] * math.sqrt(3.0 / math.prod(shape[1:])), 0.0
    elif kind == "norm":
        amp, offset = numbers[0], 1.0
    elif kind == "amp":
        amp, offset = numbers[0], numbers[1] if len(numbers) > 1 else 0.0
    else:
        raise ValueError(f"recipe rule {kind!r} for {key}: expected fan, amp, norm or keep")
    values = unit(seed, prefix + key, math.prod(shape))
    values *= np.float32(amp)
    values += np.float32(offset)
    return values.reshape(shape)
