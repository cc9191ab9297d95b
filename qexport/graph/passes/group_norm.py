"""Spell `GroupNormalization` in operators that runtimes have kernels for.

ONNX defines it as a function. ONNX Runtime's CPU provider has no kernel for it and inlines that function: about 25
nodes a layer, among them casts of the whole map. The same arithmetic, with a group as the row of a layer norm:

    x (B, C, H, W) → (B, G, C/G·H·W) → LayerNormalization → (B, C, H, W) → · scale (C, 1, 1) + bias (C, 1, 1)

The norm's own scale is a row of ones, made while it runs; the reshapes of scale and bias fold away when a runtime loads
the graph.

Not `InstanceNormalization`, which says the same with groups as channels: ONNX Runtime 1.31.1 has no CUDA kernel for the
one of opset 22 and runs it on the CPU, which copied every map there and back (var-d16 on an H100: 142 of 211 ms of an
image). On the CPU provider both take as long at most sizes, the layer norm up to a third longer at others.

Needs: maps of four dimensions, float32, and the opset-21 form (scale and bias per channel). Leaves true: standard ONNX,
parameters as they were, equality up to rounding.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class GroupNormAsLayerNorm(ir.passes.InPlacePass):
    """See module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every group normalisation."""
        nodes = [node for node in model.graph if node.op_type == "GroupNormalization"]
        for node in nodes:
            _rewrite(model.graph, node)
        return ir.passes.PassResult(model, bool(nodes))


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    x, scale, bias = node.inputs
    assert x is not None
    assert scale is not None
    assert bias is not None
    groups = node.attributes.get_int("num_groups", 1)
    split = _constant(graph, f"group_norm.{groups}.shape", np.array([0, groups, -1], np.int64))
    column = _constant(graph, "group_norm.column", np.array([-1, 1, 1], np.int64))
    shape = ir.node("Shape", [x])
    grouped = ir.node("Reshape", [x, split])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    row = ir.node("Shape", [grouped.outputs[0]], {"start": 2})
    ones = ir.node("ConstantOfShape", row.outputs, {"value": ir.tensor(np.ones(1, np.float32))})
    normal = ir.node("LayerNormalization", [grouped.outputs[0], ones.outputs[0]], {"axis": -1, "epsilon": epsilon})
    back = ir.node("Reshape", [normal.outputs[0], shape.outputs[0]])
    scale_C11, bias_C11 = ir.node("Reshape", [scale, column]), ir.node("Reshape", [bias, column])
    scaled = ir.node("Mul", [back.outputs[0], scale_C11.outputs[0]])
    out = ir.node("Add", [scaled.outputs[0], bias_C11.outputs[0]])
    nodes = [shape, grouped, row, ones, normal, back, scale_C11, scaled, bias_C11, out]
    for new in nodes:
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].type = ir.TensorType(ir.DataType.INT64 if new.op_type == "Shape" else ir.DataType.FLOAT)
    out.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], out.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        graph.register_initializer(value)
    return graph.initializers[name]
