"""One matrix, as both kinds of report show it, and sums over many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qexport.targets import Fusion

FP16_BITS = 16


@dataclass(frozen=True)
class LayerRow:
    """One matrix.

    `size_bytes` and `bits_per_weight` include scales and zero points. `algorithm` is known of bundles only, and so is
    `sqnr_db`, the signal-to-quantisation-noise ratio against the checkpoint. `fused` maps a provider to what is
    expected there; it is empty for a matrix in floating point.
    """

    name: str
    graph: str
    shape: tuple[int, ...]
    format: str
    granularity: str | None
    group_size: int | None
    bits_per_weight: float | None
    size_bytes: int | None
    quantized: bool
    algorithm: str | None = None
    sqnr_db: float | None = None
    fused: Mapping[str, Fusion] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


def sums(rows: Iterable[tuple[int, int]], prefix: str) -> dict[str, float | int | None]:
    """Totals over (weights, bytes) pairs under the keys that a manifest's totals have; `prefix` ends them.

    `share_of_fp16` is the stored bytes divided by those of the same weights in fp16.
    """
    weights = size = 0
    for count, nbytes in rows:
        weights, size = weights + count, size + nbytes
    bits = size * 8 / weights if weights else None
    return {
        f"weights_{prefix}": weights,
        f"size_bytes_{prefix}": size,
        f"bits_per_weight_{prefix}": None if bits is None else round(bits, 6),
        f"share_of_fp16_{prefix}": None if bits is None else round(bits / FP16_BITS, 6),
    }
