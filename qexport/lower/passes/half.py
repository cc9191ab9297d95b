"""A graph that computes in float16 where that is safe, with islands of float32.

Inside are the matrix products with a constant weight (the anchors), every node on a way from one anchor to another, and
what only embeds parameters or convolves on the way to one. Outside, in float32 as before, stay

- everything behind the last anchor: logits, filtering and drawing; a denoiser's update, whose terms cancel;
- everything in front of the first: sines of timesteps, which need the digits;
- `ISLANDS`: squares, roots, exponentials and sums, and the quantisation of activations, whose scales are float32.

Normalisation and attention are single nodes by now and accumulate in float32 whatever goes in. At the border stand
`Cast` nodes. Weights that are stored fp16 lose the `Cast` they had; vectors keep their float32 bytes behind a `Cast`
that a runtime folds at load, so that no tensor is stored twice. Scales of quantised weights are used as stored, fp16,
which is what fuses to MatMulNBits on float16 activations.

A state that only one graph reads and writes, both inside (a KV cache), may have float16 ports: `ports` names them.

Graphs with more convolutions than matrix products are autoencoders. They are left alone unless `convolutional` says
that their range was measured (`qexport.lower.decoder_range`); then convolutions are anchors, too. The scales of a
`Resize` stay float32 by ONNX's own rule.

Refused by name: autoencoders without that word, and states that are not inside on both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport.lower.rewrite import CONTRIB, Refusal, Rewrite, add_constant, add_node, constant, producer, sizes

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT

ISLANDS = frozenset(
    ("Pow", "Sqrt", "Exp", "Log", "Sin", "Cos", "ReduceMean", "ReduceSum", "ReduceL2", "CumSum", "Softmax", "Clip",
     "QuantizeLinear", "Abs", "ReduceMax", "TopK")
)  # fmt: skip


@dataclass(frozen=True)
class StatePorts:
    """Ports of a state that starts as zeros and that no other graph touches."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class HalfPrecision(Rewrite):
    """See module. `ports` are the states whose type may change; `changed` those where it did.

    `convolutional` takes graphs with more convolutions than products, too.
    """

    name = "compute in float16"

    def __init__(self, ports: Sequence[StatePorts] = (), convolutional: bool = False) -> None:
        super().__init__()
        self.ports = tuple(ports)
        self.convolutional = convolutional
        self.changed: list[StatePorts] = []

    def apply(self, graph: ir.Graph) -> None:
        """Convert what is inside; nothing where there is no anchor."""
        inside = self._find_inside(graph)
        if not inside:
            return
        self._choose_ports(graph, inside)
        half_inputs = {name for state in self.changed for name in state.inputs}
        half_outputs = {name for state in self.changed for name in state.outputs}
        for value in graph.inputs:
            if value.name in half_inputs:
                value.type = ir.TensorType(HALF)
        casts: dict[ir.Value, ir.Value] = {}
        ordered = [node for node in graph if node in inside]
        for node in ordered:
            for place, value in _entering(node, inside):
                node.replace_input_with(place, _as_half(graph, node, value, casts))
            self.rewritten.append(node.name or "")
        for node in ordered:
            for value in node.outputs:
                if value.dtype == FLOAT:
                    _leave(graph, value, inside, half_outputs)

    def values(self, graph: ir.Graph) -> tuple[list[ir.Node], list[ir.Value]]:
        """What would compute in float16, and every value that would be rounded to it; changes nothing."""
        inside = self._find_inside(graph)
        ordered = [node for node in graph if node in inside]
        found: dict[ir.Value, None] = {}
        for node in ordered:
            found |= dict.fromkeys(value for _, value in _entering(node, inside) if _stored(value) is None)
            found |= dict.fromkeys(value for value in node.outputs if _is_float(value))
        return ordered, list(found)

    def _find_inside(self, graph: ir.Graph) -> set[ir.Node]:
        anchors = [node for node in graph if _is_anchor(node)]
        convolutions = [node for node in graph if node.op_type == "Conv"]
        if self.convolutional:
            anchors += [node for node in convolutions if has_plain_weight(node)]
        if not anchors:
            return set()
        if len(convolutions) > len(anchors):
            self.refused.append(Refusal(graph.name or "graph", "convolutional; its range in float16 is not proven"))
            return set()
        return _inside(graph, anchors)

    def _choose_ports(self, graph: ir.Graph, inside: set[ir.Node]) -> None:
        inputs = {value.name: value for value in graph.inputs}
        outputs = {value.name: value for value in graph.outputs}
        self.changed = []
        for state in self.ports:
            read = all(use.node in inside for name in state.inputs for use in inputs[name].uses())
            made = all(_made_inside(outputs[name], inside) for name in state.outputs)
            if read and made and state.inputs and state.outputs:
                self.changed.append(state)
            else:
                self.refused.append(Refusal(state.inputs[0], "this state is not in float16 on both ends"))


def has_plain_weight(node: ir.Node) -> bool:
    """Whether the second input is a parameter in floating point."""
    weight = node.inputs[1]
    return weight is not None and (weight.is_initializer() or _stored(weight) is not None)


def _entering(node: ir.Node, inside: set[ir.Node]) -> list[tuple[int, ir.Value]]:
    """The float32 values that come to an inner node from outside, with their places."""
    inputs = node.inputs[:1] if node.op_type == "Resize" else node.inputs
    return [
        (place, value)
        for place, value in enumerate(inputs)
        if value is not None and _is_float(value) and not _made_inside(value, inside)
    ]


def _is_float(value: ir.Value) -> bool:
    return value.dtype == FLOAT


def _carries_reals(value: ir.Value) -> bool:
    """Whether real numbers flow on through it: as they are, or as codes."""
    return _is_float(value) or producer(value, "QuantizeLinear") is not None


def _is_anchor(node: ir.Node) -> bool:
    if node.domain == CONTRIB:
        return node.op_type == "Attention"
    if node.op_type != "MatMul" or node.domain != "":
        return False
    weight = node.inputs[1]
    source = producer(weight, "DequantizeLinear", "Cast")
    stored = source.inputs[0] if source is not None else weight
    return stored is not None and stored.is_initializer() and stored.dtype is not None


def _inside(graph: ir.Graph, anchors: Sequence[ir.Node]) -> set[ir.Node]:
    behind, before = set(anchors), set(anchors)
    order = list(graph)
    for node in order:
        if any(_carries_reals(v) and v.producer() in behind for v in node.inputs if v is not None):
            behind.add(node)
    for node in reversed(order):
        if any(use.node in before for value in node.outputs if _carries_reals(value) for use in value.uses()):
            before.add(node)
    inside = {node for node in behind & before if not _is_island(node)}
    for node in order:  # weights and embeddings on the way in
        if node in before and node not in inside and not _is_island(node) and _only_parameters(node, inside):
            inside.add(node)
    return inside


def _is_island(node: ir.Node) -> bool:
    quantised_input = node.op_type == "DequantizeLinear" and producer(node.inputs[0], "QuantizeLinear") is not None
    return node.op_type in ISLANDS or quantised_input or all(value.dtype != FLOAT for value in node.outputs)


def _only_parameters(node: ir.Node, inside: set[ir.Node]) -> bool:
    """Whether a node embeds parameters, or convolves: all its real inputs are parameters or inside."""
    if node.op_type == "Conv":
        return True
    if node.op_type == "Cast":
        return False  # of a stored weight; its readers take the weight itself
    floats = [value for value in node.inputs if value is not None and (_is_float(value) or value.dtype == HALF)]
    return bool(floats) and all(
        value.is_initializer() or _stored(value) is not None or value.producer() in inside for value in floats
    )


def _stored(value: ir.Value) -> ir.Value | None:
    """The fp16 initialiser behind a `Cast`."""
    cast = producer(value, "Cast")
    source = cast.inputs[0] if cast is not None else None
    return source if source is not None and source.is_initializer() and source.dtype == HALF else None


def _filled(value: ir.Value) -> tuple[ir.Node, float] | None:
    """The node that fills a tensor with one number (the unit scale of a norm), and the number."""
    maker = producer(value, "ConstantOfShape")
    given = maker.attributes.get("value") if maker is not None else None
    return (maker, given.as_tensor().numpy().item()) if maker is not None and given is not None else None


def _made_inside(value: ir.Value, inside: set[ir.Node]) -> bool:
    return value.producer() in inside


def _as_half(graph: ir.Graph, before: ir.Node, value: ir.Value, casts: dict[ir.Value, ir.Value]) -> ir.Value:
    stored = _stored(value)
    if stored is not None:
        return stored
    filled = _filled(value)
    if filled is not None and value not in casts:
        maker, number = filled
        half = ir.tensor(np.full(1, number, np.float16))
        casts[value] = add_node(
            graph, maker, "ConstantOfShape", maker.inputs, f"{maker.name}.half", {"value": half},
            shapes=[sizes(value)], dtype=HALF,
        )[0]  # fmt: skip
    if value not in casts:
        numbers = constant(value) if value.is_initializer() else None
        if numbers is not None:
            casts[value] = add_constant(graph, f"{value.name}.half", numbers.astype(np.float16))
        else:
            casts[value] = _cast(graph, value, HALF, f"{value.name}/half", before)
    return casts[value]


def _leave(graph: ir.Graph, value: ir.Value, inside: set[ir.Node], half_outputs: set[str]) -> None:
    """Give the output of an inner node its type, and what is outside a float32 copy of it."""
    value.type = ir.TensorType(HALF)
    outer = [use for use in value.uses() if use.node not in inside and use.node.op_type not in ("Cast", "Shape")]
    outer += [use for use in value.uses() if use.node.op_type == "Cast" and not _casts_to_half(use.node)]
    port = value.is_graph_output() and value.name not in half_outputs
    if not outer and not port:
        return
    node = value.producer()
    assert node is not None
    name = value.name or ""
    if port:
        value.name = f"{name}.half"
    back = ir.node("Cast", [value], {"to": FLOAT}, name=f"{name}/float")
    out = back.outputs[0]
    out.name, out.type, out.shape = (name if port else f"{name}/float:0"), ir.TensorType(FLOAT), value.shape
    graph.insert_after(node, back)
    for use in outer:
        use.node.replace_input_with(use.idx, out)
    if port:
        for i, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[i] = out


def _casts_to_half(node: ir.Node) -> bool:
    return node.attributes.get_int("to", 0) == HALF


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str, before: ir.Node) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": dtype}, name=name)
    out = cast.outputs[0]
    out.name, out.type, out.shape = f"{name}:0", ir.TensorType(dtype), value.shape
    graph.insert_before(before, cast)
    return out
