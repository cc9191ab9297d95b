"""Lay traced parts out as one graph: copy after copy, wired by the names of their ports."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qexport.family import GraphSpec, Part, Port
from qexport.graph.scopes import scopes_of, set_scopes

IR_VERSION = 11
"""The first that knows opset 23; what onnx itself pairs with it."""


def compose(spec: GraphSpec, traced: Sequence[ir.Model]) -> ir.Model:
    """The graph of `spec` from one traced model per part.

    Parameters become initialisers without value, named with the prefix of their part; constants are shared between the
    copies of a part.

    Raises:
        ValueError: a port that nothing feeds.
    """
    builder = _Builder(spec)
    for number, (part, model) in enumerate(zip(spec.all_parts, traced, strict=True)):
        builder.add(number, part, model.graph)
    return builder.finish(dict(traced[0].opset_imports))


class _Builder:
    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self.inputs = [_port_value(port) for port in spec.inputs]
        self.wires: dict[str, ir.Value] = {
            port.name: value for port, value in zip(spec.inputs, self.inputs, strict=True)
        }
        self.initializers: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def add(self, number: int, part: Part, graph: ir.Graph) -> None:
        constants = {
            id(value): self._constant(f"constant.{number}.{index}", value)
            for index, value in enumerate(v for v in graph.initializers.values() if v.const_value is not None)
        }
        for copy in range(len(part.modules)):
            self._add_copy(part, graph, copy, dict(constants))

    def _add_copy(self, part: Part, graph: ir.Graph, copy: int, values: dict[int, ir.Value]) -> None:
        prefix = part.prefix.format(i=copy)
        for value, port in zip(graph.inputs, part.inputs, strict=True):
            name = port.name.format(i=copy)
            if name not in self.wires:
                raise ValueError(f"graph {self.spec.name!r}: nothing feeds port {name!r}")
            values[id(value)] = self.wires[name]
        for name, value in graph.initializers.items():
            if value.const_value is None and value.uses():
                values[id(value)] = self._parameter(prefix + name, value)
        for node in graph:
            self.nodes.append(_copy_node(node, values, prefix))
        for value, port in zip(graph.outputs, part.outputs, strict=True):
            self.wires[port.name.format(i=copy)] = values[id(value)]

    def _constant(self, name: str, original: ir.Value) -> ir.Value:
        tensor = original.const_value
        assert tensor is not None
        value = _value_like(original, name)
        value.const_value = ir.tensor(tensor.numpy(), name=name)
        self.initializers[name] = value
        return value

    def _parameter(self, name: str, original: ir.Value) -> ir.Value:
        if name not in self.initializers:
            self.initializers[name] = _value_like(original, name)
        return self.initializers[name]

    def finish(self, opset_imports: dict[str, int]) -> ir.Model:
        outputs = []
        for port in self.spec.outputs:
            value = self.wires[port.name]
            value.name, value.shape = port.name, ir.Shape(port.shape)
            outputs.append(value)
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=list(self.initializers.values()),
            opset_imports=opset_imports, name=self.spec.name,
        )  # fmt: skip
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qexport")


def _port_value(port: Port) -> ir.Value:
    return ir.Value(name=port.name, type=ir.TensorType(ir.DataType[_IR_NAMES[port.dtype]]), shape=ir.Shape(port.shape))


_IR_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def _own_type(value: ir.Value) -> ir.TypeProtocol | None:
    """A type of its own: onnx_ir's types are mutable, and copies of a part get weights of different types."""
    return None if value.dtype is None else ir.TensorType(value.dtype)


def _value_like(original: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=_own_type(original), shape=original.shape)


def _copy_node(node: ir.Node, values: dict[int, ir.Value], prefix: str) -> ir.Node:
    """A copy that reads and makes the values of one copy of a part; shapes carry the tracer's symbols and go."""
    outputs = [ir.Value(type=_own_type(output)) for output in node.outputs]
    values |= {id(old): new for old, new in zip(node.outputs, outputs, strict=True)}
    copied = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values[id(value)] for value in node.inputs],
        list(node.attributes.values()),
        outputs=outputs,
        version=node.version,
    )
    scopes = scopes_of(node)
    if scopes:
        set_scopes(copied, [prefix + scope if scope else prefix.rstrip(".") for scope in scopes])
    return copied
