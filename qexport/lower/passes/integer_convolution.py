"""A convolution whose input, weight and output are quantised becomes one integer operator.

    y  = DQ(Q(Conv(DQ(Q(x, sₓ, zₓ)), DQ(w, s_w)) + b), s_y)
    y' = DQ(QLinearConv(Q(x, sₓ, zₓ + 128), w, b'), s_y, 128)     b' = round(b / (sₓ · s_w)), int32

With codes x̂ = x / sₓ and ŵ = w / s_w, the convolution is sₓ · s_w · (Σ x̂ ŵ + b / (sₓ s_w)). `QLinearConv` sums in
int32, adds b' and multiplies by sₓ · s_w / s_y in float32 before it rounds, half to even, and saturates. So both sides
round the same number but for (1) the rounding of the bias, at most ½ sₓ s_w, and (2) float32's own, in the sums of the
portable graph and in that factor. An output code differs only where this moves a number over the border between two
codes, and then by one. `qexport.verify.integer_convolutions` holds every operator to that.

Activations are uint8 with a zero point of 128 more, which are the same numbers: ONNX Runtime's kernels for x86 multiply
uint8 by int8, and where such a processor lacks VNNI the option that keeps sums exact (`qexport.targets.ort_cpu`) makes
weights uint8, for which `QLinearConv` takes no int8 input.

ONNX Runtime finds some of these by itself, not where a `Shape` or a second node reads what comes out of a convolution.

Refused by name: weights that are not int8 with scales per channel or one for all, zero points of weights that are not
0, inputs or outputs without one known int8 scale, an output that is also read before it is rounded, a bias that is no
constant, and a bias with which sums might leave int32: |b'| + K · 255 · 127 > 2³¹ − 1, K products in a sum.

Legend: O output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.lower.rewrite import (
    Rewrite,
    add_constant,
    add_node,
    nodes,
    producer,
    remove_unused,
    replace,
    sizes,
    sole_reader,
)

OFFSET = 128
"""From an int8 code to the uint8 code of the same number."""

GREATEST_SUM = 2**31 - 1
GREATEST_PRODUCT = 255 * 127


@dataclass(frozen=True)
class _Rounding:
    """One rounding: its codes, scale () float32 with its number, int8 zero point, and what `QuantizeLinear` reads."""

    codes: ir.Value
    scale: ir.Value
    number: np.float32
    zero_point: int
    quantised: ir.Value | None = None


class IntegerConvolution(Rewrite):
    """See module."""

    name = "convolution in integers"

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every convolution with a quantised input whose output is quantised."""
        for convolution in nodes(graph, "Conv"):
            y = convolution.outputs[0]
            readers = {use.node for use in y.uses()}
            rounded = producer(convolution.inputs[0], "DequantizeLinear")
            if rounded is not None and any(node.op_type == "QuantizeLinear" for node in readers):
                self._rewrite(graph, convolution, rounded)

    def _rewrite(self, graph: ir.Graph, convolution: ir.Node, rounded: ir.Node) -> None:
        last = sole_reader(convolution.outputs[0], "QuantizeLinear")
        restored = sole_reader(last.outputs[0], "DequantizeLinear") if last is not None else None
        if restored is None:
            self.refuse(convolution, "its output is also read before it is rounded")
            return
        given, made = _rounding(rounded), _rounding(restored)
        if given is None or made is None:
            self.refuse(convolution, "its input or output has no known int8 scale")
            return
        codes, found = _weight(convolution)
        if codes is None or isinstance(found, str):
            self.refuse(convolution, str(found))
            return
        scale_O, zero_O = found
        assert codes.shape is not None  # of an initialiser it is known
        outputs, *window = (int(size) for size in codes.shape.numpy())
        bias = convolution.inputs[2] if len(convolution.inputs) > 2 else None
        bias_O = _numbers(bias) if bias is not None else np.zeros(outputs, np.float32)
        if bias_O is None:
            self.refuse(convolution, "its bias is not a constant")
            return
        bias_codes_O = integer_bias(bias_O, given.number, scale_O)
        if np.abs(bias_codes_O).max(initial=0) + int(np.prod(window)) * GREATEST_PRODUCT > GREATEST_SUM:
            self.refuse(convolution, "its bias or its sums may not fit into 32 bits")
            return

        name, stem = f"{convolution.name}.integer", str(codes.name)
        x, y, shape = convolution.inputs[0], restored.outputs[0], sizes(convolution.outputs[0])
        x_zero, y_zero = (_zero_point(graph, rounding.zero_point) for rounding in (given, made))
        x_codes = given.codes
        if given.quantised is not None:
            x_codes = add_node(
                graph, convolution, "QuantizeLinear", [given.quantised, given.scale, x_zero], f"{name}/x",
                shapes=[sizes(given.codes)], dtype=ir.DataType.UINT8,
            )[0]  # fmt: skip
        channel_scale_O = np.broadcast_to(scale_O, (outputs,)).astype(np.float32)
        inputs: list[ir.Value | None] = [
            x_codes, given.scale, x_zero,
            codes, add_constant(graph, f"{stem}/channel_scale", channel_scale_O),
            zero_O or add_constant(graph, f"{stem}/zero_point", np.zeros(outputs, np.int8)),
            made.scale, y_zero,
        ]  # fmt: skip
        if bias is not None:  # two uses of one weight have inputs, and so units, of their own
            inputs.append(add_constant(graph, f"{name}/bias", bias_codes_O.astype(np.int32)))
        y_codes = add_node(
            graph, convolution, "QLinearConv", inputs, name, dict(convolution.attributes), shapes=[shape],
            dtype=ir.DataType.UINT8,
        )[0]  # fmt: skip
        new = add_node(graph, restored, "DequantizeLinear", [y_codes, made.scale, y_zero], f"{name}/y", shapes=[shape])
        replace(graph, y, new[0])
        remove_unused(graph, y, x)
        self.rewritten.append(convolution.name or "")


def integer_bias(bias_O: np.ndarray, x_scale: np.float32, scale_O: np.ndarray) -> np.ndarray:
    """The bias in units of one product of codes, half to even, int64 (O,)."""
    return np.rint(bias_O.astype(np.float64) / (np.float64(x_scale) * scale_O.astype(np.float64))).astype(np.int64)


def _rounding(dequantize: ir.Node) -> _Rounding | None:
    """How the pair that ends in `dequantize` rounds; None where it is not by one known scale to int8.

    Codes that a `QLinearConv` made are uint8 already.
    """
    codes, scale = dequantize.inputs[0], dequantize.inputs[1]
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    quantize = producer(codes, "QuantizeLinear")
    source = quantize or producer(codes, "QLinearConv")
    number = _numbers(scale)
    if codes is None or scale is None or source is None or number is None or number.shape:
        return None
    if quantize is None:
        code = _numbers(zero)
        return None if code is None else _Rounding(codes, scale, np.float32(number), int(code) - OFFSET)
    code = _numbers(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    back = np.int8(0) if zero is None else _numbers(zero)
    if code is None or code.shape or code.dtype != np.int8 or back != code or quantize.inputs[1] is not scale:
        return None
    return _Rounding(codes, scale, np.float32(number), int(code), quantize.inputs[0])


def _weight(convolution: ir.Node) -> tuple[ir.Value | None, tuple[np.ndarray, ir.Value | None] | str]:
    """Codes of the weight with scales, (O,) or (), and zero points; or in words why it is not what is needed."""
    weight = producer(convolution.inputs[1], "DequantizeLinear")
    codes = weight.inputs[0] if weight is not None else None
    if weight is None or codes is None or codes.dtype != ir.DataType.INT8 or not codes.is_initializer():
        return codes, "its weight is not int8"
    scale_O, zero_O = _numbers(weight.inputs[1]), weight.inputs[2] if len(weight.inputs) > 2 else None
    by_channel = weight.attributes.get_int("axis", 1) == 0 and not weight.attributes.get_int("block_size", 0)
    if scale_O is None or not (by_channel or not scale_O.shape):
        return codes, "its weight has no scales by output channel"
    if zero_O is not None and ((zeros := _numbers(zero_O)) is None or np.any(zeros)):
        return codes, "its weight has zero points other than 0"
    return codes, (scale_O, zero_O)


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initialiser, also behind a Cast to float32; None for what is computed."""
    cast = producer(value, "Cast")
    stored = cast.inputs[0] if cast is not None else value
    if stored is None or not stored.is_initializer() or stored.const_value is None:
        return None
    numbers = stored.const_value.numpy()
    return numbers if cast is None else numbers.astype(np.float32)


def _zero_point(graph: ir.Graph, code: int) -> ir.Value:
    return add_constant(graph, f"lower.zero_point.{code + OFFSET}", np.array(code + OFFSET, np.uint8))
