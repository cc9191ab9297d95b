"""How a graph quantises what flows into a layer and out of it, read from its nodes.

Shares no code with what wrote them.

fixed      x → QuantizeLinear → DequantizeLinear → the layer's first input, with one scale: a constant, or one
           element of the port `act_scale`
per token  x → Reshape (T, K) → QuantizeLinear (axis 0) → DequantizeLinear (axis 0) → Reshape → the first input,
           with scale = Max(ReduceMax(|x|, axis 1) / greatest, least)
output     a convolution → QuantizeLinear → DequantizeLinear, with one constant scale, and nothing else reads the float
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from qexport.errors import BundleError
from qexport.verify.onnx_file import OnnxFile, attribute

PORT = "act_scale"
"""The input of a graph that carries the scales of the step."""


@dataclass(frozen=True)
class Quantiser:
    """What is done to a layer's input, or output.

    `x` names the tensor that enters (before any Reshape), `type` the element type of the codes (`TensorProto`'s),
    `scale` is a constant float32, or None where `element` (of the port) or `token` says where it comes from; `token`
    is (greatest, least). `restored` names the tensor that leaves, where it is an output's.
    """

    x: str
    type: int
    scale: np.ndarray | None = None
    zero_point: int = 0
    element: int | None = None
    token: tuple[float, float] | None = None
    restored: str = ""


def quantiser_of(file: OnnxFile, layer: NodeProto) -> Quantiser | str:
    """The quantiser in front of a MatMul or Conv; or in words what is there instead."""
    last = file.producers.get(layer.input[0])
    if last is None:
        return "its input is not quantised"
    try:
        if last.op_type == "DequantizeLinear":
            return _fixed(file, last)
        if last.op_type == "Reshape" and _made_by(file, last.input[0], "DequantizeLinear") is not None:
            return _per_token(file, last)
    except (_UnexpectedError, BundleError) as error:
        return str(error)
    return "its input is not quantised"


def output_quantiser_of(file: OnnxFile, layer: NodeProto) -> Quantiser | str:
    """The quantiser behind a Conv; or in words what is there instead."""
    y = layer.output[0]
    readers = [node for node, _ in file.consumers[y]]
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return "its output is not quantised"
    after = [node for node, _ in file.consumers[readers[0].output[0]]]
    if len(after) != 1 or after[0].op_type != "DequantizeLinear":
        return f"{readers[0].name!r} is not followed by one DequantizeLinear"
    quantize, dequantize = readers[0], after[0]
    zeros = [file.read(name) for node in (quantize, dequantize) for name in node.input[2:] if name in file.initializers]
    kinds = {file.initializers[name].data_type for name in quantize.input[2:] if name in file.initializers}
    if quantize.input[1] != dequantize.input[1] or len(kinds) != 1 or any(zero.shape or zero.any() for zero in zeros):
        return f"{quantize.name!r} and {dequantize.name!r} have not one scale and zero points of 0"
    try:
        _no_blocks(quantize, dequantize)
        scale = file.constant(quantize.input[1])
    except (_UnexpectedError, BundleError) as error:
        return str(error)
    if scale is None or scale.shape != ():
        return f"the scale of {quantize.name!r} is not a constant number"
    return Quantiser(y, kinds.pop(), scale, restored=dequantize.output[0])


def _fixed(file: OnnxFile, dequantize: NodeProto) -> Quantiser:
    quantize = _need(file, dequantize.input[0], "QuantizeLinear", dequantize)
    if list(dequantize.input[1:]) != list(quantize.input[1:]) or len(quantize.input) != 3:
        raise _UnexpectedError(f"{dequantize.name!r} has another scale or zero point than {quantize.name!r}")
    _no_blocks(quantize, dequantize)
    scale, zero = quantize.input[1:]
    if zero not in file.initializers or list(file.initializers[zero].dims):
        raise _UnexpectedError(f"the zero point of {quantize.name!r} is not a constant number")
    zero_point, kind = file.read(zero), file.initializers[zero].data_type
    gather = _made_by(file, scale, "Gather")
    if gather is not None:
        index = file.constant(gather.input[1])
        if gather.input[0] != PORT or index is None or index.shape != ():
            raise _UnexpectedError(f"the scale of {quantize.name!r} is not one element of the port {PORT!r}")
        return Quantiser(quantize.input[0], kind, None, int(zero_point), element=int(index))
    value = file.constant(scale)
    if value is None or value.shape != ():
        raise _UnexpectedError(f"the scale of {quantize.name!r} is not a constant number")
    return Quantiser(quantize.input[0], kind, value, int(zero_point))


def _per_token(file: OnnxFile, restored: NodeProto) -> Quantiser:
    dequantize = _need(file, restored.input[0], "DequantizeLinear", restored)
    quantize = _need(file, dequantize.input[0], "QuantizeLinear", dequantize)
    flat = _need(file, quantize.input[0], "Reshape", quantize)
    shape = _need(file, restored.input[1], "Shape", restored)
    width = file.constant(flat.input[1])
    ratio = _need(file, quantize.input[1], "Max", quantize)
    least = file.constant(ratio.input[1])
    divided = _need(file, ratio.input[0], "Div", ratio)
    greatest = file.constant(divided.input[1])
    most = _need(file, divided.input[0], "ReduceMax", divided)
    axes = file.constant(most.input[1])
    magnitude = _need(file, most.input[0], "Abs", most)
    good = (
        [len(quantize.input), len(dequantize.input)] == [2, 2]
        and dequantize.input[1] == quantize.input[1]
        and attribute(quantize, "axis", 1) == attribute(dequantize, "axis", 1) == 0
        and magnitude.input[0] == quantize.input[0]
        and shape.input[0] == flat.input[0]
        and attribute(most, "keepdims", 1) == 0
        and axes is not None
        and axes.tolist() == [1]
        and width is not None
        and width.shape == (2,)
        and width[0] == -1
    )
    if not good or greatest is None or least is None:
        raise _UnexpectedError(f"{quantize.name!r} has no scale per token")
    _no_blocks(quantize, dequantize)
    kind = attribute(quantize, "output_dtype", 0)
    return Quantiser(flat.input[0], kind, token=(float(greatest), float(least)))


def _no_blocks(quantize: NodeProto, dequantize: NodeProto) -> None:
    if attribute(quantize, "saturate", 1) != 1:
        raise _UnexpectedError(f"{quantize.name!r} does not saturate")
    if attribute(quantize, "block_size", 0) or attribute(dequantize, "block_size", 0):
        raise _UnexpectedError(f"{quantize.name!r} has scales by block")
    precision = attribute(quantize, "precision", 0)
    if precision not in (0, TensorProto.FLOAT):
        raise _UnexpectedError(f"{quantize.name!r} divides in another precision than float32")


def _need(file: OnnxFile, value: str, op_type: str, reader: NodeProto) -> NodeProto:
    node = _made_by(file, value, op_type)
    if node is None:
        raise _UnexpectedError(f"{reader.name!r} is not fed by a {op_type}")
    return node


def _made_by(file: OnnxFile, value: str, op_type: str) -> NodeProto | None:
    node = file.producers.get(value)
    return node if node is not None and node.op_type == op_type else None


class _UnexpectedError(Exception):
    """The nodes are not those of a quantiser; the text says which."""
