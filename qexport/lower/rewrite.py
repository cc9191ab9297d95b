"""What every rewrite of a graph shares: it counts what it did and names what it would not do.

A rewrite leaves the graph as it was wherever its conditions do not hold, and says why in `Refusal.reason`: a graph that
is slower than it could be must not be silent about it. Rewrites find their patterns by the structure of the graph and
by shapes; names are for people. They run on graphs whose shapes were inferred (`qexport.lower.graphs`).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qexport.targets.keys import JOINED_KEY

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


@dataclass(frozen=True)
class Refusal:
    """A place that looked like the pattern and was left alone."""

    node: str
    reason: str


class Rewrite(ir.passes.InPlacePass):
    """A pass that keeps account. `name` is for reports; `rewritten` has the place of every rewrite."""

    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.rewritten: list[str] = []
        self.refused: list[Refusal] = []
        self.joined: dict[str, list[str]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every place that fits."""
        self.rewritten, self.refused, self.joined = [], [], {}
        self.apply(model.graph)
        if self.joined:
            known = json.loads(model.metadata_props.get(JOINED_KEY, "{}"))
            model.metadata_props[JOINED_KEY] = json.dumps(known | self.joined)
        if any(node.domain == CONTRIB for node in model.graph):
            model.graph.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, bool(self.rewritten))

    @abstractmethod
    def apply(self, graph: ir.Graph) -> None:
        """Rewrite one graph; fills `rewritten` and `refused`."""

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Note that a place was left alone."""
        self.refused.append(Refusal(node.name or node.op_type, reason))


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node of ONNX's own domain that makes `value`, if it is one of `op_types`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types and node.domain == "" else None


def sole_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only node that reads `value`, if it is one of `op_types` and `value` is no output of the graph."""
    readers = {use.node for use in value.uses()}
    if len(readers) != 1 or value.is_graph_output():
        return None
    node = next(iter(readers))
    return node if node.op_type in op_types and node.domain == "" else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initialiser that lies in the graph itself (shapes, scalars); None for anything else."""
    tensor = value.const_value if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return None
    return tensor.numpy()


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant of whole numbers as a list, also where it is a single one."""
    array = constant(value)
    return None if array is None or array.dtype.kind != "i" else [int(n) for n in array.reshape(-1)]


def sizes(value: ir.Value | None) -> list[int | None] | None:
    """The shape of a value, unknown sizes as None; None where even the number of dimensions is unknown."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions, where it is known."""
    found = sizes(value)
    return None if found is None else len(found)


def last_size(value: ir.Value | None) -> int | None:
    """Size of the last dimension, where it is known."""
    found = sizes(value)
    return found[-1] if found else None


def is_vector_parameter(value: ir.Value | None) -> bool:
    """Whether a value is an initialiser of one dimension (a bias, a norm's scale)."""
    return value is not None and value.is_initializer() and rank(value) == 1


def add_constant(graph: ir.Graph, name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """An initialiser, shared by all who ask for the same name."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(tensor.shape.numpy())
        graph.register_initializer(value)
    return graph.initializers[name]


def add_node(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    shapes: Sequence[Sequence[int | None] | None] = (None,),
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> list[ir.Value]:
    """Insert a node in front of `before` and return its outputs, one per entry of `shapes` (None: not known).

    A name that is taken gets a number: runtimes want names of their own for all nodes.
    """
    taken = {node.name for node in graph}
    wanted, number = name, 0
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    node = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, num_outputs=len(shapes), name=name)
    for number, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
        value.name, value.type = f"{name}:{number}", ir.TensorType(dtype)
        value.shape = None if shape is None else ir.Shape(shape)
    graph.insert_before(before, node)
    return list(node.outputs)


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all readers of `old`, and the graph's outputs, take `new`; an output keeps its name."""
    is_output, name = old.is_graph_output(), old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if is_output:
        old.name, new.name = None, name
        new.type, new.shape = old.type, old.shape


def remove_unused(graph: ir.Graph, *values: ir.Value | None) -> None:
    """Remove the nodes that make these values, and what only they needed, where nothing reads them any more."""
    waiting = [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        waiting += [source for source in node.inputs if source is not None]
        graph.remove(node, safe=True)


def nodes(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    """Nodes of these types in ONNX's own domain, as the graph is now; a node removed meanwhile is passed over."""
    for node in [node for node in graph if node.op_type in op_types and node.domain == ""]:
        if node.graph is not None:
            yield node
