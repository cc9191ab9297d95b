"""A layer's input is no longer rounded: its quantiser goes, and what only integer kernels wanted goes with it.

    DQ(Q(x, s, z), s, z) · W                    →   x · W
    Squeeze(DQ(Q(Unsqueeze(x, 0))) · W, 0)      →   x · W            the dimension was an integer kernel's
    DQ(codes, scale, 0)                         →   DQ(codes, scale)  a zero point of zeros likewise

The only rewrite that changes numbers by more than their order: results come nearer to those of the full-precision
model, by what rounding did to this input. For layers where a provider has no kernel for quantised inputs, so that
rounding is work on top of a floating-point product (`qexport.lower.choose`). It runs first: what is left is a
weight-only layer, which later rewrites join and fuse like any other.

Refused by name: scales per token, whose nodes are other ones.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qexport.lower.rewrite import Rewrite, add_node, integers, nodes, producer, remove_unused, replace, sole_reader


class UnroundedInputs(Rewrite):
    """See module. `chosen` are the initialisers of the layers' codes."""

    name = "inputs no longer rounded"

    def __init__(self, chosen: Collection[str] = ()) -> None:
        super().__init__()
        self.chosen = frozenset(chosen)

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every product with a chosen weight."""
        for matmul in nodes(graph, "MatMul"):
            weight = producer(matmul.inputs[1], "DequantizeLinear")
            codes = weight.inputs[0] if weight is not None else None
            if weight is not None and codes is not None and codes.is_initializer() and codes.name in self.chosen:
                self._rewrite(graph, matmul, weight)

    def _rewrite(self, graph: ir.Graph, matmul: ir.Node, weight: ir.Node) -> None:
        rounded = matmul.inputs[0]
        dequantize = producer(rounded, "DequantizeLinear")
        quantize = producer(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
        if quantize is None or quantize.inputs[0] is None:
            self.refuse(matmul, "its input is not quantised by one scale")
            return
        x, product = quantize.inputs[0], matmul.outputs[0]
        added, taken = producer(x, "Unsqueeze"), sole_reader(product, "Squeeze")
        matmul.replace_input_with(0, x)
        if added is not None and taken is not None and _axes(added) == _axes(taken) == [0]:
            matmul.replace_input_with(0, added.inputs[0])
            product.shape = taken.outputs[0].shape
            replace(graph, taken.outputs[0], product)
            remove_unused(graph, taken.outputs[0], x)
        remove_unused(graph, rounded)
        _drop_zero_point(graph, weight)
        self.rewritten.append(matmul.name or "")


def _axes(node: ir.Node) -> list[int] | None:
    return integers(node.inputs[1]) if len(node.inputs) > 1 else None


def _drop_zero_point(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Without one where all are zero, which is what no zero point means."""
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if zero is None or zero.const_value is None or np.any(np.asarray(zero.const_value.numpy(), np.float32)):
        return
    old = dequantize.outputs[0]
    attributes = {name: dequantize.attributes.get_int(name) for name in dequantize.attributes}
    name = f"{dequantize.name}.symmetric"
    new = add_node(graph, dequantize, "DequantizeLinear", dequantize.inputs[:2], name, attributes)[0]
    new.shape = old.shape
    replace(graph, old, new)
    remove_unused(graph, old)
