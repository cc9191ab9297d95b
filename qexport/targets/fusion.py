"""Which kernel a quantised matrix becomes on each provider. Expected from ONNX Runtime's rules, not measured here.

What is common to providers stands here; what each does with quantised activations, in its own file. The placement audit
holds what really happened against this (`qexport.verify.placement`), and tests hold both against ONNX Runtime's CPU
provider.

A weight-only matrix, ``MatMul(x, DequantizeLinear(W, scale))``, is fused to MatMulNBits by the CPU and the CUDA
provider alike if W is a constant [K, N] of 2, 4 or 8 bits on the second input, with blocks along K of a power of two
from 16 to 256, or a scale per column, or one scale; and if nothing else reads the result. `Gemm` counts as `MatMul`
unless it has transB=1. What does not fuse dequantises its weight at every run, which costs more than an fp32 matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qexport.formats import stored_as
from qexport.scheme import PerToken

FUSED_FORMATS = frozenset({"int2", "int4", "int8", "uint2", "uint4", "uint8"})
"""Integers as ONNX has them."""

MIN_BLOCK, MAX_BLOCK = 16, 256
CONVOLUTION_DIMENSIONS = 4
"""Of a weight (outputs, inputs, height, width)."""

PRODUCTS = ("MatMul", "Gemm")

INTEGER_CONVOLUTION = "QLinearConv"
INTEGER_TARGETS = ("ort-cpu",)
"""Targets whose graphs hold convolutions as that operator, where input, weight and output are int8."""


@dataclass(frozen=True)
class WeightUse:
    """How a graph uses a quantised weight.

    `format` is that of the tensor (`qexport.formats.stored_as`). `block` is the number of weights that share a scale
    along the blocked axis, None for a scale per column or one in all. `along_input` is whether scales lie as the rule
    above wants them. `operator` reads the weight, through a Transpose if `transposed`; `readers` is how many nodes read
    it.
    """

    format: str
    block: int | None
    operator: str = "MatMul"
    readers: int = 1
    along_input: bool = True
    transposed: bool = False
    activation_format: str | None = None
    per_token: bool = False


@dataclass(frozen=True)
class Fusion:
    """The kernel that a weight ends in, or None and the reason why it is not fused."""

    kernel: str | None
    reason: str = ""


def weight_only(use: WeightUse) -> Fusion:
    """What becomes of a weight with floating-point activations: the same on the CPU and on CUDA."""
    if use.operator not in PRODUCTS:
        return Fusion(None, f"read by {use.operator}; only MatMul and Gemm fuse")
    if use.format not in FUSED_FORMATS:
        return Fusion(None, f"no fused kernel takes {use.format}")
    if use.readers != 1:
        return Fusion(None, f"read by {use.readers} nodes; only a single reader fuses")
    if use.transposed:
        return Fusion(None, "stored as [N, K]; only [K, N] fuses")
    if not use.along_input:
        return Fusion(None, "scales run along the wrong axis; blocks must lie along K, single scales along N")
    if use.block is not None and (use.block & (use.block - 1) or not MIN_BLOCK <= use.block <= MAX_BLOCK):
        return Fusion(None, f"blocks of {use.block}; only powers of two from {MIN_BLOCK} to {MAX_BLOCK} fuse")
    return Fusion("MatMulNBits")


def not_fused(provider: str, use: WeightUse) -> Fusion:
    """What is said of quantised activations that a provider has no kernel for."""
    if use.operator not in PRODUCTS:
        return Fusion(None, f"read by {use.operator}; only MatMul and Gemm fuse")
    return Fusion(None, f"{provider} fuses no {use.activation_format} activations with {use.format} weights")


def use_of(row: Mapping[str, Any]) -> WeightUse:
    """A row of the manifest's layer table: the exporter brings matrices into the form MatMul(x, W[K, N]), read once."""
    return WeightUse(
        stored_as(str(row.get("format"))),
        row.get("group_size"),
        operator="Conv" if len(row.get("shape", ())) == CONVOLUTION_DIMENSIONS else "MatMul",
        activation_format=row.get("activation_format"),
        per_token=row.get("activation_scales") == str(PerToken()),
    )


def integer_convolution(row: Mapping[str, Any]) -> bool:
    """Whether a row of the manifest's layer table is a convolution that integer kernels compute as a whole."""
    kinds = (row.get("activation_format"), row.get("output_format"))
    return kinds == ("int8", "int8") and row.get("format") in ("int8", "int6")


def weight_of(row: Mapping[str, Any]) -> str:
    """The initialiser of a row of the manifest's layer table; the decoder's layers have their graph in their name."""
    return f"{str(row['name']).removeprefix(str(row['graph']) + '/')}.weight"
