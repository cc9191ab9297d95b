"""Number formats: which codes a stored number may have, and what they cost.

The integer conventions, stated once for all of qexport:

- A weight is ``scale × code``. There is no zero point: trained weights are centred, and symmetric codes cost nothing.
- Codes are two's complement. The *full* range of b bits is −2^(b−1) … 2^(b−1)−1; the *narrow* range leaves out the
  most negative code, so that +w and −w are held equally well. Under the narrow range 2 bits are ternary: −1, 0, 1.
- Rounding is half to even (IEEE 754's default, and what ONNX `QuantizeLinear` says). Saturation: codes are clamped.
- A code of a floating-point format is its bit pattern (sign, exponent, mantissa), rounded to nearest with ties to the
  even mantissa, saturated at the greatest finite value. There is no negative zero.
- A scale may be negative. Under the full range that puts the extra code on the other side, 2^(b−1) to the right of zero
  instead of the left, group by group and at no cost; at 2 bits it is a quarter of the codes.
- Scales are stored in fp16 and are rounded to it *before* codes are chosen, so the codes fit the scales on disk.

Bits are counted twice, and the two are never mixed: *information* bits are what the format needs in principle,
*container* bits are what a weight takes up in the file. A 3-bit integer lies in an ONNX INT4: 3 and 4.

A *study* format has no ONNX type that a runtime computes with: it can be measured in torch, and is not exported. Its
container is the narrowest of 2, 4 and 8 bits that holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qexport.errors import InputError
from qexport.suggest import nearest

SCALE_DTYPE = np.float16
"""The dtype of stored scales. Half of fp32's cost: 0.5 instead of 1 bit a weight at groups of 32."""

SCALE_BITS = 16


@dataclass(frozen=True)
class NumberFormat:
    """One number format.

    `kind` says what a code is: an integer, or the bit pattern of a small floating-point number. `bits` is the nominal
    width, `information_bits` what a weight carries, `container_bits` what it takes up once packed. `onnx_type` is the
    tensor type of the container as `onnx.TensorProto` spells it, or None for a format that can be studied but not
    exported; `min_opset` is the first ONNX opset whose blocked `DequantizeLinear` takes that type, 0 without a type.
    `mantissa_bits`, `exponent_bias` and `float_max` describe a floating-point format (OCP 8-bit floating point, 2023,
    table 1; OCP microscaling formats, 2023, tables 2 and 3). `balanced` integers lack the most negative code for good.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    information_bits: float
    container_bits: int
    onnx_type: str | None
    min_opset: int
    mantissa_bits: int = 0
    exponent_bias: int = 0
    float_max: float = 0.0
    balanced: bool = False

    @property
    def exportable(self) -> bool:
        """Whether a bundle can hold it; if not, it is a study format."""
        return self.onnx_type is not None

    @property
    def greatest(self) -> float:
        """The greatest magnitude at scale 1, which a group's greatest weight is scaled to."""
        return float(self.code_max) if self.kind == "int" else self.float_max

    @property
    def code_min(self) -> int:
        """Least code of the full range."""
        return -self.code_max if self.balanced else -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Greatest code; the narrow range is −code_max … code_max."""
        return (1 << (self.bits - 1)) - 1


_ALL = (
    # 21 is the first opset with blocked scales, 25 the first with INT2.
    NumberFormat("int8", "int", 8, information_bits=8.0, container_bits=8, onnx_type="INT8", min_opset=21),
    NumberFormat("int6", "int", 6, information_bits=6.0, container_bits=8, onnx_type="INT8", min_opset=21),
    NumberFormat("int4", "int", 4, information_bits=4.0, container_bits=4, onnx_type="INT4", min_opset=21),
    # No runtime reads 6-bit or 3-bit integers, so they are exported in the next wider type.
    NumberFormat("int3", "int", 3, information_bits=3.0, container_bits=4, onnx_type="INT4", min_opset=21),
    NumberFormat("int2", "int", 2, information_bits=2.0, container_bits=2, onnx_type="INT2", min_opset=25),
    # Codes −1, 0, 1 whatever the algorithm: log₂ 3 bits in principle.
    NumberFormat("ternary", "int", 2, math.log2(3), container_bits=2, onnx_type="INT2", min_opset=25, balanced=True),
    # E4M3 without infinities (one NaN pattern per sign), and E5M2 with IEEE 754's.
    NumberFormat("fp8-e4m3", "float", 8, 8.0, 8, "FLOAT8E4M3FN", 21, mantissa_bits=3, exponent_bias=7, float_max=448),
    NumberFormat("fp8-e5m2", "float", 8, 8.0, 8, "FLOAT8E5M2", 21, mantissa_bits=2, exponent_bias=15, float_max=57344),
    # OCP microscaling's narrow numbers: every pattern is finite. ONNX has FLOAT4E2M1, but no runtime multiplies by it.
    NumberFormat("fp6-e3m2", "float", 6, 6.0, 8, None, 0, mantissa_bits=2, exponent_bias=3, float_max=28),
    NumberFormat("fp6-e2m3", "float", 6, 6.0, 8, None, 0, mantissa_bits=3, exponent_bias=1, float_max=7.5),
    NumberFormat("fp4-e2m1", "float", 4, 4.0, 4, None, 0, mantissa_bits=1, exponent_bias=1, float_max=6),
)

FORMATS: dict[str, NumberFormat] = {number_format.name: number_format for number_format in _ALL}
"""Every format that qexport can quantise to, by name; a new format is one line above."""


def get_format(name: str) -> NumberFormat:
    """The format called `name`.

    Raises:
        InputError: no such format; the message suggests the nearest names and lists all.
    """
    if name not in FORMATS:
        raise InputError(f"unknown number format {name!r}{nearest(name, FORMATS)}; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def stored_as(name: str) -> str:
    """The integer format of the tensor that holds such codes, ``int4`` for ``int3``; other names as they are."""
    found = FORMATS.get(name)
    return found.onnx_type.lower() if found is not None and found.kind == "int" and found.onnx_type else name
