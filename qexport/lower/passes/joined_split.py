"""Splits of splits become as few nodes as possible: each is a launch, and none does more than copy.

    Split(x, 28) → 28 × Split(·, 6)      →      Split(x, 6) → 6 × Split(·, 28)

All that x is taken apart into in the end are n parts of equal width, in order. A node makes at most `MAX_PARTS` parts
of equal width (ONNX Runtime's CUDA kernel copies more pointers, and unequal widths, to the device at every run). So n
parts take one node, or n = a · b takes 1 + a: a pieces of b parts each. Where x is cut in two before, by two slices of
any width, each piece can be divided so: 170 parts take 11 nodes as 10 · 17, but 9 as 5 · 32 and 10. The division with
the fewest nodes is chosen (`division`).

Refused by name: parts of different width, and numbers of parts that no division makes with fewer nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qexport.lower.passes.split_slices import MAX_PARTS, partition
from qexport.lower.rewrite import Rewrite, add_constant, add_node, nodes, remove_unused, replace, sizes

Run = tuple[int, int]
"""Pieces, and parts of each piece."""


class JoinedSplit(Rewrite):
    """See module."""

    name = "splits of splits to few"

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every value that is taken apart in more than one step."""
        inner: set[ir.Value] = set()  # nodes come in order, so a value is met before what it is taken apart into
        for root in dict.fromkeys(node.inputs[0] for node in nodes(graph, "Split", "Slice")):
            if root is None or root in inner or root.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            tree = _Tree(root)
            inner |= tree.inner
            if tree.inner:
                self._rewrite(graph, root, tree)

    def _rewrite(self, graph: ir.Graph, root: ir.Value, tree: _Tree) -> None:
        first = next(node for node in graph if node in tree.readers)
        widths = {(sizes(leaf) or [None])[tree.axis] for leaf in tree.leaves}
        width = widths.pop()
        if widths or width is None:
            self.refuse(first, "the parts differ in width")
            return
        runs = division(len(tree.leaves))
        if runs is None or cost(runs) >= len(tree.readers):
            self.refuse(first, f"no division of {len(tree.leaves)} parts has fewer nodes")
            return
        parts = _take_apart(graph, first, root, tree.axis, width, runs)
        for leaf, part in zip(tree.leaves, parts, strict=True):
            replace(graph, leaf, part)
        for leaf in tree.leaves:
            remove_unused(graph, leaf)
        self.rewritten.append(root.name or "")


@dataclass
class _Tree:
    """How `root` is taken apart: the nodes that do so, what is taken apart again, and what is left, in order."""

    root: ir.Value
    axis: int = -1
    readers: set[ir.Node] = field(default_factory=set)
    leaves: list[ir.Value] = field(default_factory=list)
    inner: set[ir.Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._visit(self.root)

    def _visit(self, value: ir.Value) -> None:
        found = None if value.is_graph_output() and value is not self.root else _parts(value)
        if found is None or (self.axis != -1 and found[0] != self.axis):
            self.leaves.append(value)
            return
        if value is not self.root:
            self.inner.add(value)
        self.axis, parts = found
        self.readers |= {node for part in parts if (node := part.producer()) is not None}
        for part in parts:
            self._visit(part)


def _parts(value: ir.Value) -> tuple[int, list[ir.Value]] | None:
    """The axis that a value is divided along, and its parts in order; None where something else reads it, too."""
    readers = list(dict.fromkeys(use.node for use in value.uses()))
    shape = sizes(value)
    if shape is None or not readers or any(node.inputs[0] is not value or node.domain for node in readers):
        return None
    if all(node.op_type == "Slice" for node in readers):
        return partition(readers)
    if len(readers) != 1 or readers[0].op_type != "Split":
        return None
    return readers[0].attributes.get_int("axis", 0) % len(shape), list(readers[0].outputs)


def division(count: int) -> list[Run] | None:
    """The runs of parts that take the fewest nodes, one or two of them; None where there is no such division."""
    whole = _tree(count)
    found = [[whole]] if whole else []
    for head in range(count - 1, 0, -1):
        first, second = _tree(head), _tree(count - head)
        if first and second:
            found.append([first, second])
    return min(found, key=cost, default=None)


def _tree(count: int) -> Run | None:
    """The fewest pieces of equally many parts."""
    return next(((a, count // a) for a in range(1, MAX_PARTS + 1) if count % a == 0 and count // a <= MAX_PARTS), None)


def cost(runs: Sequence[Run]) -> int:
    """How many nodes a division has."""
    slices = len(runs) if len(runs) > 1 else 0
    return slices + sum((pieces > 1) + (pieces if parts > 1 else 0) for pieces, parts in runs)


def _take_apart(
    graph: ir.Graph, before: ir.Node, root: ir.Value, axis: int, width: int, runs: Sequence[Run]
) -> list[ir.Value]:
    """The parts of `root`, in order."""
    scope = (before.name or "").rpartition("/")[0]
    prefix = f"{scope}/" if scope else ""
    shape = list(sizes(root) or ())
    dtype = root.dtype or ir.DataType.FLOAT

    def resized(count: int) -> list[int | None]:
        return [*shape[:axis], count * width, *shape[axis + 1 :]]

    def split(value: ir.Value, count: int, parts_of_each: int, name: str) -> list[ir.Value]:
        if count == 1:
            return [value]
        attributes = {"axis": axis, "num_outputs": count}
        shapes = [resized(parts_of_each)] * count
        return add_node(graph, before, "Split", [value], f"{prefix}{name}", attributes, shapes=shapes, dtype=dtype)

    found: list[ir.Value] = []
    axes = add_constant(graph, f"lower.axis.{axis}", np.array([axis], np.int64))
    for number, (pieces, parts) in enumerate(runs):
        run = root
        if len(runs) > 1:
            ends = (len(found), len(found) + pieces * parts)
            bounds = [add_constant(graph, f"lower.int.{n * width}", np.array([n * width], np.int64)) for n in ends]
            run = add_node(
                graph, before, "Slice", [root, *bounds, axes], f"{prefix}Run.{number}",
                shapes=[resized(pieces * parts)], dtype=dtype,
            )[0]  # fmt: skip
        for i, piece in enumerate(split(run, pieces, parts, f"Pieces.{number}")):
            found += split(piece, parts, 1, f"Parts.{number}.{i}")
    return found
