"""Entries that are gathered from a short vector one by one become one `Split`: one launch instead of one for each.

    Gather(v, 0), Gather(v, 1), …, Slice(v, i:i+1)   →   Split(v, n) → Squeeze of what was gathered

A denoiser reads the coefficients of its step like that, from a row of n numbers. `Squeeze` moves nothing: a runtime
hands the same bytes on. Every number is the same one, to the bit.

Refused by name: vectors longer than `MAX_PARTS`. Passed over: vectors of one entry's reading, and of unknown length.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qexport.lower.passes.split_slices import MAX_PARTS, span_of_slice
from qexport.lower.rewrite import Rewrite, add_constant, add_node, constant, nodes, remove_unused, replace, sizes


class VectorEntries(Rewrite):
    """See module."""

    name = "entries of a vector to one split"

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every vector of real numbers that several nodes read one entry of."""
        for vector in dict.fromkeys(node.inputs[0] for node in nodes(graph, "Gather")):
            shape = sizes(vector)
            if vector is None or vector.dtype != ir.DataType.FLOAT or vector.is_initializer():
                continue
            if shape is None or len(shape) != 1 or shape[0] is None:
                continue
            length = shape[0]
            entries = {
                use.node: entry
                for use in vector.uses()
                if use.idx == 0 and (entry := _entry(use.node, length)) is not None
            }
            if len(entries) < 2:
                continue
            if length > MAX_PARTS:
                self.refuse(next(iter(entries)), f"the vector has more than {MAX_PARTS} entries")
                continue
            self._rewrite(graph, vector, length, entries)

    def _rewrite(self, graph: ir.Graph, vector: ir.Value, length: int, entries: dict[ir.Node, int]) -> None:
        earliest = next(node for node in graph if node in entries)
        name = f"{vector.name}/Entries"
        axis = add_constant(graph, "lower.axis.0", np.array([0], np.int64))
        attributes = {"axis": 0, "num_outputs": length}
        parts = add_node(graph, earliest, "Split", [vector], name, attributes, shapes=[[1]] * length)
        for node, entry in entries.items():
            value = parts[entry]
            if node.op_type == "Gather":
                value = add_node(graph, earliest, "Squeeze", [value, axis], f"{name}.{entry}", shapes=[[]])[0]
            replace(graph, node.outputs[0], value)
        remove_unused(graph, *(node.outputs[0] for node in entries))
        self.rewritten.append(vector.name or "")


def _entry(node: ir.Node, length: int) -> int | None:
    """The place of the one entry that a node takes: a scalar by `Gather`, a vector of one by `Slice`."""
    if node.domain != "":
        return None
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        return None if index is None or index.ndim else int(index) % length
    span = span_of_slice(node) if node.op_type == "Slice" else None
    return span[1] if span is not None and span[2] == span[1] + 1 else None
