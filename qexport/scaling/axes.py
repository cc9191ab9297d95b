"""What quality is drawn against: kinds of bits, as `qexport.scaling.cost` counts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BITS_A_MB = 8e6
BITS_A_G = 1e9


@dataclass(frozen=True)
class Axis:
    """`label` stands beside an axis, `words` in a sentence; an amount is told in `unit`, `bits_a_unit` each."""

    label: str
    words: str
    unit: str = "MB of weights"
    bits_a_unit: float = BITS_A_MB

    def amount(self, log2_bits: float) -> float:
        """So many bits, given as their logarithm, in the unit."""
        return 2**log2_bits / self.bits_a_unit


TOTAL = "total_bits"
COMPUTE = "compute_bits"

AXES: Mapping[str, Axis] = {
    TOTAL: Axis("bits of all parameters (information, scales counted)", "total bits"),
    "stored_bits": Axis("bits of all parameters as stored", "stored bits"),
    "matrix_bits": Axis("bits of the quantised matrices (information, scales counted)", "matrix bits"),
    COMPUTE: Axis("compute bits: MACs · weight bits, an image", "compute bits", "G compute bits an image", BITS_A_G),
}
"""By the name of the column."""
