"""Linear layers that read the same input become one: adaptive layer norm projects one condition for every block.

    x·W₀ + b₀, x·W₁ + b₁, …      →      x·[W₀ W₁ …] + [b₀ b₁ …], taken apart

Codes and scales are laid side by side along the outputs, so every product is what it was. The rows of the condition get
a dimension first, (Z, K) → (Z, 1, K): the result is then broadcast over tokens as it is, and the bias is [1, 1, N],
which ONNX Runtime does not fold into MatMulNBits. Runs of equal width are taken apart by one `Split` of at most
`MAX_PARTS` outputs, where there are several runs after one `Slice` each.

Only layers with two-dimensional input are joined; tokens would pay for the copies. Refused by name: weights that are
stored unlike any other, inputs that are quantised (each layer has its own scale), and layers without bias.

Legend: Z rows of the condition, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import onnx_ir as ir

from qexport.lower.matrices import Matrix, read_matrix, side_by_side
from qexport.lower.passes.split_slices import MAX_PARTS
from qexport.lower.rewrite import (
    Rewrite,
    add_constant,
    add_node,
    integers,
    is_vector_parameter,
    nodes,
    producer,
    rank,
    remove_unused,
    replace,
    sole_reader,
)


class _Layer:
    """One of the layers: its MatMul, the Add of its bias, and its weight."""

    def __init__(self, matmul: ir.Node, add: ir.Node, bias: ir.Value, matrix: Matrix) -> None:
        self.matmul, self.add, self.bias, self.matrix = matmul, add, bias, matrix
        self.width = matrix.outputs


class SharedInputGemm(Rewrite):
    """See module."""

    name = "one GEMM for layers with the same input"

    def apply(self, graph: ir.Graph) -> None:
        """Join the layers of every input that several read."""
        groups: dict[ir.Value, list[ir.Node]] = {}
        for matmul in nodes(graph, "MatMul"):
            value = _condition(matmul.inputs[0])
            if value is not None and rank(value) == 2 and _has_weight(matmul):
                groups.setdefault(value, []).append(matmul)
        for value, matmuls in groups.items():
            if len(matmuls) > 1:
                self._join(graph, value, matmuls)

    def _join(self, graph: ir.Graph, value: ir.Value, matmuls: Sequence[ir.Node]) -> None:
        kinds: dict[str, list[_Layer]] = {}
        for matmul in matmuls:
            layer = self._layer(matmul, value)
            if layer is not None:
                kinds.setdefault(layer.matrix.kind, []).append(layer)
        for kind, layers in kinds.items():
            if len(layers) > 1:
                self._rewrite(graph, value, layers)
            else:
                self.refuse(layers[0].matmul, f"no other layer with this input is stored as {kind}")

    def _layer(self, matmul: ir.Node, value: ir.Value) -> _Layer | None:
        if matmul.inputs[0] is not value:
            self.refuse(matmul, "its input is quantised with a scale of its own")
            return None
        matrix = read_matrix(matmul.inputs[1])
        add = sole_reader(matmul.outputs[0], "Add")
        bias = next((source for source in add.inputs if is_vector_parameter(source)), None) if add else None
        if matrix is None or add is None or bias is None:
            self.refuse(matmul, "it has no bias" if matrix else "its weight is stored in a way that cannot be joined")
            return None
        return _Layer(matmul, add, bias, matrix)

    def _rewrite(self, graph: ir.Graph, value: ir.Value, layers: Sequence[_Layer]) -> None:
        first = layers[0].matmul
        name = f"{first.name}.and_{len(layers) - 1}_more"
        total = sum(layer.width for layer in layers)
        one = add_constant(graph, "lower.axis.1", np.array([1], np.int64))
        rows = add_node(graph, first, "Unsqueeze", [value, one], f"{name}/Unsqueeze", shapes=[[None, 1, None]])[0]
        weight = side_by_side(graph, first, [layer.matrix for layer in layers], f"{name}.weight")
        self.joined[f"{name}.weight"] = [layer.matrix.stored.name or "" for layer in layers]
        product = add_node(graph, first, "MatMul", [rows, weight], name, shapes=[[None, 1, total]])[0]
        biases = [np.asarray(layer.bias.const_value, np.float32).reshape(-1) for layer in layers]
        bias = add_constant(graph, f"{name}.bias", np.concatenate(biases).reshape(1, 1, -1))
        joined = add_node(graph, first, "Add", [product, bias], f"{name}/Add", shapes=[[None, 1, total]])[0]
        for layer, part in zip(layers, _take_apart(graph, first, joined, layers, name), strict=True):
            _hand_over(graph, layer, part, one)
            remove_unused(graph, layer.add.outputs[0])
            self.rewritten.append(layer.matmul.name or "")


def _condition(value: ir.Value | None) -> ir.Value | None:
    """What a layer reads, seen through the quantisation of its input."""
    while (node := producer(value, "DequantizeLinear", "QuantizeLinear", "Unsqueeze", "Reshape")) is not None:
        if rank(node.inputs[0]) == 2 or node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            value = node.inputs[0]
        else:
            break
    return value


def _has_weight(matmul: ir.Node) -> bool:
    second = matmul.inputs[1]
    source = producer(second, "DequantizeLinear", "Cast")
    stored = source.inputs[0] if source is not None else second
    return stored is not None and stored.is_initializer()


def _take_apart(
    graph: ir.Graph, before: ir.Node, joined: ir.Value, layers: Sequence[_Layer], name: str
) -> list[ir.Value]:
    """The parts (Z, 1, N) of each layer."""
    runs: list[list[_Layer]] = []
    for _, equal in groupby(layers, key=lambda layer: layer.width):
        run = list(equal)
        runs += [run[i : i + MAX_PARTS] for i in range(0, len(run), MAX_PARTS)]
    axis = add_constant(graph, "lower.axis.2", np.array([2], np.int64))
    parts: list[ir.Value] = []
    start = 0
    for number, run in enumerate(runs):
        width = sum(layer.width for layer in run)
        piece = joined
        if len(runs) > 1:
            bounds = [add_constant(graph, f"lower.int.{n}", np.array([n], np.int64)) for n in (start, start + width)]
            piece = add_node(
                graph, before, "Slice", [joined, *bounds, axis], f"{name}/Slice.{number}", shapes=[[None, 1, width]]
            )[0]
        start += width
        if len(run) == 1:
            parts.append(piece)
            continue
        parts += add_node(
            graph, before, "Split", [piece], f"{name}/Split.{number}", {"axis": 2, "num_outputs": len(run)},
            shapes=[[None, 1, layer.width] for layer in run],
        )  # fmt: skip
    return parts


def _hand_over(graph: ir.Graph, layer: _Layer, part: ir.Value, one: ir.Value) -> None:
    """Let the readers of the layer's output (Z, N) take `part` (Z, 1, N)."""
    out = layer.add.outputs[0]
    split, unsqueeze = sole_reader(out, "Split"), sole_reader(out, "Unsqueeze")
    if unsqueeze is not None and integers(unsqueeze.inputs[1]) == [1]:
        replace(graph, unsqueeze.outputs[0], part)
        remove_unused(graph, unsqueeze.outputs[0])
        return
    readers = [sole_reader(output, "Unsqueeze") for output in split.outputs] if split is not None else []
    if split is not None and all(node is not None and integers(node.inputs[1]) == [1] for node in readers):
        shapes = [[None, 1, layer.width // len(readers)]] * len(readers)
        split_name = f"{split.name}.rows"
        attributes = {"axis": 2, "num_outputs": len(readers)}
        rows = add_node(graph, split, "Split", [part], split_name, attributes, shapes=shapes)
        for node, row in zip(readers, rows, strict=True):
            assert node is not None
            replace(graph, node.outputs[0], row)
            remove_unused(graph, node.outputs[0])
        return
    name = f"{layer.add.name}/Squeeze"
    flat = add_node(graph, layer.add, "Squeeze", [part, one], name, shapes=[[None, layer.width]])[0]
    replace(graph, out, flat)
