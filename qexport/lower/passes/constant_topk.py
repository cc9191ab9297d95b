"""`TopK` with a count that is known only while it runs takes all entries instead, and what lies behind k is masked.

    v = TopK(x, k)                              v = TopK(x, V)
    last of v                               →   Gather(v, k − 1)
    Pad(Exp(v − first), V − k zeros)            Where(0 … V−1 < k, Exp(v − first), 0)

`TopK` wants its count in the memory of the host, and `Pad` its widths, so a count that comes as an input on a GPU is
waited for and copied at every run, and ONNX Runtime refuses to capture the graph as a CUDA graph. The same numbers: the
entries in front of k are the same ones, and a zero is added where a zero was. Sorting V entries instead of k costs
little where one block of threads sorts a row, which ONNX Runtime's CUDA kernel does for up to `MOST` entries.

Refused by name: more than `MOST` entries, an axis other than the last, indices that are read, values that are an
output, and readers of another kind than those above (a choice among the first k, `GatherElements`, stays as it is).

Legend: V entries of a row, k those asked for.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.lower.rewrite import (
    Rewrite,
    add_constant,
    add_node,
    constant,
    integers,
    last_size,
    nodes,
    remove_unused,
    replace,
    sizes,
    sole_reader,
)

MOST = 4096
"""Sixteen for each of 256 threads; rows of more are sorted one after another (ONNX Runtime 1.31)."""

_END = 2**62
"""Ends of slices from here on mean the end of the axis."""


class ConstantTopk(Rewrite):
    """See module."""

    name = "top-k of a constant count"

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every `TopK` whose count is computed."""
        for topk in nodes(graph, "TopK"):
            if constant(topk.inputs[1]) is not None:
                continue
            reason = self._try(graph, topk)
            if reason:
                self.refuse(topk, reason)

    def _try(self, graph: ir.Graph, topk: ir.Node) -> str | None:
        x, count = topk.inputs
        values, indices = topk.outputs
        width, rank = last_size(x), len(sizes(x) or [])
        if x is None or count is None or width is None or width > MOST:
            return f"rows of more than {MOST} entries, or of a size that is not known"
        if topk.attributes.get_int("axis", -1) not in (-1, rank - 1) or not topk.attributes.get_int("largest", 1):
            return "not the largest along the last axis"
        if indices.uses() or indices.is_graph_output():
            return "its indices are read"
        if values.is_graph_output():
            return "its values are an output, of which the count is the size"
        lasts, pads = [], []
        for reader in dict.fromkeys(use.node for use in values.uses()):
            pad = _padded(reader, width)
            if _is_last(reader, rank):
                lasts.append(reader)
            elif pad is not None:
                pads.append(pad)
            elif not _is_first(reader, rank) and reader.op_type != "GatherElements":
                return f"{reader.op_type} reads it, and it might mind entries behind the count"
        everything = add_constant(graph, f"lower.int.{width}", np.array([width], np.int64))
        topk.replace_input_with(1, everything)
        values.shape = ir.Shape([*list(values.shape or x.shape or [])[:-1], width])
        self._entries(graph, topk, count, values, lasts)
        self._masks(graph, topk, count, width, pads)
        self.rewritten.append(topk.name or "")
        return None

    def _entries(self, graph: ir.Graph, topk: ir.Node, count: ir.Value, values: ir.Value, lasts: list[ir.Node]) -> None:
        """The last entry in front of the count."""
        one = add_constant(graph, "lower.int.1", np.array([1], np.int64))
        for node in lasts:
            index = add_node(
                graph, node, "Sub", [count, one], f"{topk.name}.last", shapes=[[1]], dtype=ir.DataType.INT64
            )
            shape = [*(sizes(values) or [])[:-1], 1]
            out = add_node(graph, node, "Gather", [values, index[0]], f"{topk.name}.kth", {"axis": -1}, shapes=[shape])
            replace(graph, node.outputs[0], out[0])
            remove_unused(graph, node.outputs[0])

    def _masks(
        self, graph: ir.Graph, topk: ir.Node, count: ir.Value, width: int, pads: list[tuple[ir.Node, ir.Value]]
    ) -> None:
        """Zeros behind the count."""
        places = add_constant(graph, f"lower.places.{width}", np.arange(width, dtype=np.int64))
        zero = add_constant(graph, "lower.zero", np.array(0, np.float32))
        for pad, numbers in pads:
            kept = add_node(
                graph, pad, "Less", [places, count], f"{topk.name}.kept", shapes=[[width]], dtype=ir.DataType.BOOL
            )
            shape = [*(sizes(topk.inputs[0]) or [])[:-1], width]
            masked = add_node(graph, pad, "Where", [kept[0], numbers, zero], f"{topk.name}.masked", shapes=[shape])
            replace(graph, pad.outputs[0], masked[0])
            remove_unused(graph, pad.outputs[0])


def _span(node: ir.Node, rank: int) -> tuple[int, int] | None:
    """Start and end of a slice along the last axis; None for anything else."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    start, end, axes = (integers(node.inputs[i]) for i in (1, 2, 3))
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if start is None or end is None or steps != [1] or axes not in ([-1], [rank - 1]):
        return None
    return start[0], end[0]


def _is_last(node: ir.Node, rank: int) -> bool:
    span = _span(node, rank)
    return span is not None and span[0] == -1 and span[1] >= _END


def _is_first(node: ir.Node, rank: int) -> bool:
    span = _span(node, rank)
    return span is not None and span[0] >= 0 and span[1] == 1


def _padded(node: ir.Node, width: int) -> tuple[ir.Node, ir.Value] | None:
    """The `Pad` that fills up Exp(v − first) with zeros to the whole width, and what it fills up."""
    exp = sole_reader(node.outputs[0], "Exp") if node.op_type == "Sub" else None
    pad = sole_reader(exp.outputs[0], "Pad") if exp is not None else None
    if exp is None or pad is None or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    value = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(())
    filled = last_size(pad.outputs[0])
    whole = filled is None or filled == width
    return (pad, exp.outputs[0]) if value is not None and not value.any() and whole else None
