"""One layer x·W in each of the forms that the graphs of a bundle can take, as a model of its own for measuring.

Legend: K inputs, N outputs. Names of forms as in `qexport.targets.device_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qexport.bench.tiny_graphs import TYPES, model_bytes
from qexport.targets import QuantTraits

SEED = 0
SCALE = 0.01
"""Of codes and activations; speed does not depend on it."""


@dataclass(frozen=True)
class Form:
    """How a layer is stored, for which providers, and what session options should know of it."""

    weight: Callable[[int, int, bool], tuple[list[NodeProto], list[TensorProto]]]
    providers: tuple[str, ...]
    traits: QuantTraits = field(default_factory=QuantTraits)
    activation: str | None = None


def layer_model(form: Form, inputs: int, outputs: int, dtype: str) -> bytes:
    """The model ``y = x·W`` with x (rows, K) in `dtype`, ``"float32"`` or ``"float16"``."""
    half = dtype == "float16"
    nodes, initialisers = form.weight(inputs, outputs, half)
    x = "x"
    if form.activation is not None:
        nodes, more = [*_round_trip(form.activation), *nodes], _activation_scale(form.activation, half)
        initialisers, x = [*initialisers, *more], "x.rounded"
    nodes.append(helper.make_node("MatMul", [x, "w"], ["y"]))
    kind = TYPES[dtype]
    return model_bytes(
        nodes,
        [helper.make_tensor_value_info("x", kind, ["rows", inputs])],
        [helper.make_tensor_value_info("y", kind, ["rows", outputs])],
        initialisers,
    )


def _plain(inputs: int, outputs: int, half: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    rng = np.random.default_rng(SEED)
    w_KN = rng.normal(size=(inputs, outputs)).astype(np.float16 if half else np.float32)
    return [], [numpy_helper.from_array(w_KN, "w")]


def _blocks(bits: int, block: int) -> Callable[[int, int, bool], tuple[list[NodeProto], list[TensorProto]]]:
    """Packed codes of 4 or 2 bits; ternary ones lie in the latter."""

    def make(inputs: int, outputs: int, half: bool) -> tuple[list[NodeProto], list[TensorProto]]:
        most = 1 << (bits - 1)
        codes = np.random.default_rng(SEED).integers(-most, most, inputs * outputs)
        kind = TensorProto.INT4 if bits == 4 else TensorProto.INT2
        stored = helper.make_tensor("codes", kind, (inputs, outputs), codes.tolist())
        return _dequantize([stored], (-(-inputs // block), outputs), half, axis=0, block_size=block)

    return make


def _int8(inputs: int, outputs: int, half: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    codes = np.random.default_rng(SEED).integers(-127, 128, (inputs, outputs)).astype(np.int8)
    return _dequantize([numpy_helper.from_array(codes, "codes")], (outputs,), half, axis=1)


def _int8_with_zero(inputs: int, outputs: int, half: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    """As the exporter writes layers with integer activations: `qexport.targets.ort_cpu` says why."""
    codes = np.random.default_rng(SEED).integers(-127, 128, (inputs, outputs)).astype(np.int8)
    zero = numpy_helper.from_array(np.zeros(outputs, np.int8), "zero")
    return _dequantize([numpy_helper.from_array(codes, "codes"), zero], (outputs,), half, axis=1)


def _fp8(inputs: int, outputs: int, half: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    codes = np.random.default_rng(SEED).normal(size=(inputs, outputs)).astype(ml_dtypes.float8_e4m3fn)
    raw = helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, (inputs, outputs), codes.tobytes(), raw=True)
    return _dequantize([raw], (outputs,), half, axis=1)


def _dequantize(
    stored: list[TensorProto], scales: tuple[int, ...], half: bool, **attributes: Any
) -> tuple[list[NodeProto], list[TensorProto]]:
    scale = numpy_helper.from_array(np.full(scales, SCALE, np.float16), "scale")
    zero = [tensor.name for tensor in stored[1:]]
    if half:
        nodes = [helper.make_node("DequantizeLinear", ["codes", "scale", *zero], ["w"], **attributes)]
    else:
        nodes = [
            helper.make_node("Cast", ["scale"], ["scale.float"], to=TensorProto.FLOAT),
            helper.make_node("DequantizeLinear", ["codes", "scale.float", *zero], ["w"], **attributes),
        ]
    return nodes, [*stored, scale]


ACTIVATIONS = {"int8": TensorProto.INT8, "fp8-e4m3": TensorProto.FLOAT8E4M3FN}


def _round_trip(activation: str) -> list[NodeProto]:
    return [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.codes"]),
        helper.make_node("DequantizeLinear", ["x.codes", "x.scale", "x.zero"], ["x.rounded"]),
    ]


def _activation_scale(activation: str, half: bool) -> list[TensorProto]:
    scale = numpy_helper.from_array(np.array(SCALE, np.float16 if half else np.float32), "x.scale")
    return [scale, helper.make_tensor("x.zero", ACTIVATIONS[activation], (), b"\x00", raw=True)]


_INT8 = frozenset({"int8"})
_STATIC = QuantTraits(with_activations=_INT8, activations=_INT8, integer=True)
_NOTHING_FOLDED = QuantTraits(with_activations=_INT8, activations=_INT8, weight_only=frozenset({"int4"}))
"""A graph that also has weight-only layers: on CUDA nothing is folded then (`qexport.targets.ort_cuda`)."""
_FP8 = frozenset({"fp8-e4m3"})
_FP8_STATIC = QuantTraits(with_activations=_FP8, activations=_FP8)
"""Weights are folded for the whole session: on the CPU always, on CUDA where no layer is weight-only."""
_BOTH = ("cpu", "cuda")


def _weight_only(*formats: str) -> QuantTraits:
    return QuantTraits(weight_only=frozenset(formats))


FORMS: Mapping[str, Form] = {
    "float32": Form(_plain, ("cpu",)),
    "float16": Form(_plain, ("cuda",)),
    "int2-b32": Form(_blocks(2, 32), _BOTH, _weight_only("int2")),
    "int2-b64": Form(_blocks(2, 64), _BOTH, _weight_only("int2")),
    "int2-b128": Form(_blocks(2, 128), _BOTH, _weight_only("int2")),
    "int4-b32": Form(_blocks(4, 32), _BOTH, _weight_only("int4")),
    "int4-b64": Form(_blocks(4, 64), _BOTH, _weight_only("int4")),
    "int4-b128": Form(_blocks(4, 128), _BOTH, _weight_only("int4")),
    "int8-channel": Form(_int8, _BOTH, _weight_only("int8")),
    "int8-static": Form(_int8_with_zero, ("cpu",), _STATIC, "int8"),
    "int8-static-folded": Form(_plain, _BOTH, QuantTraits(), "int8"),
    "fp8-static": Form(_fp8, ("cpu",), _FP8_STATIC, "fp8-e4m3"),
    "fp8-static-folded": Form(_plain, _BOTH, _FP8_STATIC, "fp8-e4m3"),
}
"""What `calibrate` measures. Static forms of CUDA are added below: there the exporter's zero points are in the way."""

CUDA_FORMS: Mapping[str, Form] = {
    "int8-static": Form(_int8, ("cuda",), _NOTHING_FOLDED, "int8"),
    "fp8-static": Form(_fp8, ("cuda",), replace(_FP8_STATIC, weight_only=frozenset({"int4"})), "fp8-e4m3"),
}


def forms_of(provider: str) -> dict[str, Form]:
    """The forms that are measured on a provider, by name."""
    found = {name: form for name, form in FORMS.items() if provider in form.providers}
    return found | {name: form for name, form in CUDA_FORMS.items() if provider in form.providers}
