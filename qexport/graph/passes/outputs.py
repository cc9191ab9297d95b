"""Quantise what comes out of a convolution: a pair ``QuantizeLinear → DequantizeLinear`` behind it, bias and all.

    Conv(x, w, b) → Q(s, z) → DQ(s) → what read the convolution

The standard form of an integer convolution: TensorRT and ONNX Runtime's CPU provider look for it. The zero point z = 0
gives `QuantizeLinear` its type. `DequantizeLinear` has none, which means 0 as well, and must not have it: where such a
pair stands in front of a Reshape, ONNX Runtime 1.31.1 repeats it behind, gives the copy ``output_dtype`` INT8, turns
int8 into uint8 elsewhere, and then refuses its own graph ("output_dtype INT8 does not match y_zero_point type UINT8").

Needs: as `QuantizeActivations`, and before or behind it. Leaves true: names and ports.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qexport.graph.passes.activations import WEIGHT_SUFFIX
from qexport.solution import Activation

SCALE_SUFFIX = ".out_scale"
ZERO_POINT_SUFFIX = ".out_zero_point"


class QuantizeOutputs(ir.passes.InPlacePass):
    """Quantise the outputs of the convolutions in `outputs`, by the name of their weight's initialiser.

    Raises:
        ValueError: a weight that is no parameter of the graph, or that something else than a Conv reads.
    """

    def __init__(self, outputs: Mapping[str, Activation]) -> None:
        super().__init__()
        self.outputs = outputs

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See class."""
        graph = model.graph
        for name, output in self.outputs.items():
            weight = graph.initializers.get(name)
            uses = list(weight.uses()) if weight is not None else []
            if not uses or any(use.node.op_type != "Conv" or use.idx != 1 for use in uses):
                raise ValueError(f"{name!r}: its output is to be quantised but it is no weight of a Conv alone")
            stem = name.removesuffix(WEIGHT_SUFFIX)
            scale = _constant(graph, f"{stem}{SCALE_SUFFIX}", np.asarray(output.scale, np.float32))
            zero_point = _constant(graph, f"{stem}{ZERO_POINT_SUFFIX}", np.array(0, np.int8))
            for number, use in enumerate(uses):
                prefix = stem + (f".{number}" if len(uses) > 1 else "")
                _insert(graph, use.node, f"{prefix}.output", scale, zero_point)
        return ir.passes.PassResult(model, bool(self.outputs))


def _insert(graph: ir.Graph, convolution: ir.Node, prefix: str, scale: ir.Value, zero_point: ir.Value) -> None:
    y = convolution.outputs[0]
    quantize = ir.node("QuantizeLinear", [y, scale, zero_point], name=f"{prefix}/QuantizeLinear")
    codes = quantize.outputs[0]
    dequantize = ir.node("DequantizeLinear", [codes, scale], name=f"{prefix}/DequantizeLinear")
    restored = dequantize.outputs[0]
    for node, dtype in ((quantize, ir.DataType.INT8), (dequantize, ir.DataType.FLOAT)):
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{node.name}:0", ir.TensorType(dtype), y.shape
    graph.insert_after(convolution, [quantize, dequantize])
    is_output, name = y.is_graph_output(), y.name
    for use in list(y.uses()):
        if use.node is not quantize:
            use.node.replace_input_with(use.idx, restored)
    if is_output:
        graph.outputs[list(graph.outputs).index(y)] = restored
        y.name, restored.name = f"{prefix}/float", name


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value
