"""What each target gets: its rewrites in order, the types it computes in, and the bundles it refuses.

    ort-cpu    ONNX Runtime's CPU provider    float32
    ort-cuda   ONNX Runtime's CUDA provider   float16 (or float32)
    tensorrt   TensorRT, through ONNX Runtime or alone: standard operators only; the engine fuses by itself

On the CPU provider (1.31.1, one thread, in turns with the portable graph, medians of 40) attention without transposes
gains 2 to 6 %, a rotary embedding in one node 4 % (of a tiny LlamaGen, where the number of kernels decides).
SkipLayerNormalization loses 10 to 27 % (its kernel there is scalar); bias with GELU, one GEMM for all modulations and
the fused attention gain nothing. So the first two are used there and the others are not.

On the CUDA provider (1.31.1, H100, DiT-XL/2 in float16, one forward of 2, 16 and 64 samples as a CUDA graph) a norm
that takes its modulation gains 2.7, 1.8 and 2.0 %: 2.948 → 2.867, 11.399 → 11.198, 43.63 → 42.75 ms. It comes before
`SkipNorm`, which gets the norms that nothing modulates.

Session options are not here but in `qexport.targets`, which the runtime reads without onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qexport.bundle import Manifest
from qexport.errors import UnsupportedError
from qexport.lower.passes.bias_gelu import BiasGelu
from qexport.lower.passes.bias_rank import BiasRank
from qexport.lower.passes.chunks_of_heads import ChunksOfHeads
from qexport.lower.passes.constant_topk import ConstantTopk
from qexport.lower.passes.fold_offset import FoldOffset
from qexport.lower.passes.fused_attention import FusedAttention
from qexport.lower.passes.heads_in_place import HeadsInPlace
from qexport.lower.passes.idle_transpose import IdleTranspose
from qexport.lower.passes.integer_convolution import IntegerConvolution
from qexport.lower.passes.joined_bias import JoinedBias
from qexport.lower.passes.joined_split import JoinedSplit
from qexport.lower.passes.modulated_norm import ModulatedNorm
from qexport.lower.passes.rms_norm import RmsNorm
from qexport.lower.passes.rotary import Rotary
from qexport.lower.passes.shared_input_gemm import SharedInputGemm
from qexport.lower.passes.skip_norm import SkipNorm
from qexport.lower.passes.split_slices import SplitSlices
from qexport.lower.passes.unit_norm import UnitNorm
from qexport.lower.passes.vector_entries import VectorEntries
from qexport.lower.rewrite import Rewrite
from qexport.scheme import PerToken
from qexport.suggest import nearest

SHAPING: tuple[type[Rewrite], ...] = (IdleTranspose, JoinedBias, ChunksOfHeads, SplitSlices, FoldOffset)
"""Standard operators only, and what the later rewrites look for."""

NORMS_AND_HEADS: tuple[type[Rewrite], ...] = (UnitNorm, RmsNorm, HeadsInPlace)
CONTRIB: tuple[type[Rewrite], ...] = (SkipNorm, BiasGelu, Rotary)

NARROW = ("int4", "int3")
"""Formats that lie in an INT4."""

TENSORRT_BLOCKS = (64, 128)
"""Blocks of int4 weights that TensorRT takes; it knows no other width of weight-only block quantisation."""


@dataclass(frozen=True)
class Target:
    """One place where a bundle can run; `dtypes` are what its graphs may compute in, the first by default."""

    name: str
    provider: str
    dtypes: tuple[str, ...]
    rewrites: tuple[type[Rewrite], ...]
    obstacle: Callable[[Manifest], str | None]


def _none(manifest: Manifest) -> str | None:
    return None


def _tensorrt(manifest: Manifest) -> str | None:
    """Why TensorRT does not take this bundle."""
    for row in manifest.layers:
        reason = _tensorrt_row(row)
        if reason:
            return f"layer {row['name']!r} {reason}"
    return None


def _tensorrt_row(row: Mapping[str, Any]) -> str | None:
    form, group = str(row.get("format")), row.get("group_size")
    if not row.get("algorithm"):
        return None
    if form in NARROW and group not in TENSORRT_BLOCKS:
        return f"has {form} weights in groups of {group}, TensorRT takes {_or(TENSORRT_BLOCKS)} (--group-size 128)"
    if form == "fp8-e5m2" or row.get("activation_format") == "fp8-e5m2":
        return "is in fp8 e5m2, TensorRT takes e4m3 (--format fp8)"
    if form not in ("int4", "int3", "int8", "int6", "fp8-e4m3"):
        return f"is in {form}, TensorRT takes int4 weights, int8 and fp8 e4m3"
    if row.get("activation_scales") == str(PerToken()):
        return "has activation scales per token, made while it runs, TensorRT takes scales that are known before"
    if group is not None and form not in NARROW:
        return f"has {form} weights in groups, TensorRT takes one scale per channel"
    return None


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("ort-cpu", "cpu", ("float32",), (*SHAPING, *NORMS_AND_HEADS, Rotary, IntegerConvolution), _none),
        Target(
            "ort-cuda", "cuda", ("float16", "float32"),
            (*SHAPING, SharedInputGemm, JoinedSplit, VectorEntries, *NORMS_AND_HEADS, FusedAttention, ModulatedNorm,
             *CONTRIB, BiasRank, ConstantTopk), _none,
        ),
        Target("tensorrt", "tensorrt", ("float32",), (*SHAPING, SharedInputGemm), _tensorrt),
    )
}  # fmt: skip


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UnsupportedError: there is none.
    """
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise UnsupportedError(f"unknown target {name!r}{nearest(name, TARGETS)}; one of {known}")
    return TARGETS[name]
