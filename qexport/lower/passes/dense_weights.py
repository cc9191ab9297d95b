"""A quantised weight becomes a constant floating-point one, when the session is made and not before.

    DequantizeLinear(codes, scale)   →   (Cast(codes) − Cast(zero)) · Cast(scale), in blocks by way of [K/g, g, N]

The same numbers: a code times an fp16 scale is exact in float32, and where the graph computes in float16 the product is
rounded to it once, as DequantizeLinear does. ONNX Runtime folds ordinary arithmetic on constants at load, but not a
DequantizeLinear (unless told to for the whole session, which stops fusion elsewhere). So the file stays as small as it
was, the session holds the weight in full, and the product is an ordinary MatMul: for layers where that is the faster
form (`qexport.lower.choose`), or where a provider would dequantise at every run.

Refused by name: scales along another axis than the rule of `qexport.lower.matrices`.

Legend: K inputs, N outputs, g group.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qexport.lower.rewrite import Rewrite, add_constant, add_node, nodes, producer, remove_unused, replace
from qexport.targets.keys import JOINED_KEY

DENSE = "dense"
"""Part of the names of the nodes, by which `qexport.verify.placement` knows the constant that comes of them."""


class DenseWeights(Rewrite):
    """See module. `chosen` are the initialisers of codes; of weights that were joined since, all must be among them."""

    name = "weights dequantised at load"

    def __init__(self, chosen: Collection[str] = ()) -> None:
        super().__init__()
        self.chosen = frozenset(chosen)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the chosen weights."""
        joined = json.loads(model.metadata_props.get(JOINED_KEY, "{}"))
        self._wanted = self.chosen | {name for name, parts in joined.items() if self.chosen.issuperset(parts)}
        return super().call(model)

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every chosen weight."""
        for node in nodes(graph, "DequantizeLinear"):
            codes = node.inputs[0]
            if codes is not None and codes.is_initializer() and codes.name in self._wanted:
                self._rewrite(graph, node, codes)

    def _rewrite(self, graph: ir.Graph, node: ir.Node, codes: ir.Value) -> None:
        out = node.outputs[0]
        shape = [int(size) for size in codes.shape.numpy()] if codes.shape is not None else []
        axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
        if len(shape) != 2 or axis != (0 if block else 1) or (block and shape[0] % block):
            self.refuse(node, "its scales do not lie along the inputs in whole blocks, nor along the outputs")
            return
        name = f"{codes.name}/{DENSE}"

        def real(value: ir.Value, what: str) -> ir.Value:
            """The numbers as float32, in blocks [K/g, g or 1, N]."""
            if producer(value, "Cast") is not None or value.dtype != ir.DataType.FLOAT:
                value = add_node(graph, node, "Cast", [value], f"{name}.{what}", {"to": ir.DataType.FLOAT})[0]
            if not block:
                return value
            sizes = [shape[0] // block, block if what == "codes" else 1, shape[1]]
            target = add_constant(graph, f"lower.shape.{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))
            return add_node(graph, node, "Reshape", [value, target], f"{name}.{what}/blocks")[0]

        scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        assert scale is not None
        numbers = real(codes, "codes")
        if zero is not None:
            numbers = add_node(graph, node, "Sub", [numbers, real(zero, "zero")], f"{name}/Sub")[0]
        weight = add_node(graph, node, "Mul", [numbers, real(scale, "scale")], f"{name}/Mul")[0]
        if block:
            full = add_constant(graph, f"lower.shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))
            weight = add_node(graph, node, "Reshape", [weight, full], f"{name}/Reshape")[0]
        if out.dtype == ir.DataType.FLOAT16:
            weight = add_node(
                graph, node, "Cast", [weight], f"{name}/half", {"to": ir.DataType.FLOAT16}, dtype=ir.DataType.FLOAT16
            )[0]
        weight.shape = ir.Shape(shape)
        replace(graph, out, weight)
        remove_unused(graph, out)
        self.rewritten.append(codes.name or "")
