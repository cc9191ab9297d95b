"""Slices that partition a value become one `Split`: one kernel instead of several.

    Slice(x, 0:w), Slice(x, w:2w), …, Slice(x, (n−1)w:nw)  →  Split(x, num_outputs=n)

Refused by name: slices of different width (a runtime may copy the table of widths to the device at every run, as ONNX
Runtime's CUDA provider does), slices that overlap or leave a gap, and more than `MAX_PARTS` of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qexport.lower.rewrite import Rewrite, add_node, integers, nodes, remove_unused, replace, sizes

MAX_PARTS = 32
"""ONNX Runtime's CUDA kernel takes so many output pointers as arguments; more are copied to the device at every run."""


class SplitSlices(Rewrite):
    """See module."""

    name = "slices to one split"

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every value that is sliced into equal parts."""
        for first in nodes(graph, "Slice"):
            source = first.inputs[0]
            if source is None or source.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue  # arithmetic of shapes
            slices = [use.node for use in source.uses() if use.node.op_type == "Slice" and use.idx == 0]
            found = [
                (span, node) for span, node in ((span_of_slice(node), node) for node in slices) if span is not None
            ]
            ordered = sorted(found, key=lambda item: item[0])
            spans = [span for span, _ in ordered]
            if len(slices) < 2 or len(found) < len(slices) or len({axis for axis, _, _ in spans}) != 1:
                continue
            reason = _obstacle(spans, sizes(source))
            if reason is None:
                self._rewrite(graph, source, [node for _, node in ordered], spans[0][0])
            elif first is slices[0]:
                self.refuse(first, reason)

    def _rewrite(self, graph: ir.Graph, source: ir.Value, ordered: list[ir.Node], axis: int) -> None:
        earliest = next(node for node in graph if node in ordered)
        scope = (ordered[0].name or "").rpartition("/")[0]
        parts = add_node(
            graph, earliest, "Split", [source], f"{scope}/Split" if scope else "Split",
            {"axis": axis, "num_outputs": len(ordered)}, shapes=[sizes(node.outputs[0]) for node in ordered],
            dtype=source.dtype or ir.DataType.FLOAT,
        )  # fmt: skip
        for node, part in zip(ordered, parts, strict=True):
            replace(graph, node.outputs[0], part)
            remove_unused(graph, node.outputs[0])
        self.rewritten.append(source.name or "")


def span_of_slice(node: ir.Node) -> tuple[int, int, int] | None:
    """Axis, start and end of a slice of step 1 along one axis of known size."""
    start, end, axes = (integers(node.inputs[i]) for i in (1, 2, 3)) if len(node.inputs) > 3 else (None,) * 3
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    shape = sizes(node.inputs[0])
    if not (start and end and axes and shape) or len(axes) != 1 or steps != [1]:
        return None
    axis = axes[0] % len(shape)
    size = shape[axis]
    if size is None:
        return None
    bounds = [min(bound + size if bound < 0 else bound, size) for bound in (start[0], end[0])]
    return axis, bounds[0], bounds[1]


def partition(slices: Sequence[ir.Node]) -> tuple[int, list[ir.Value]] | None:
    """The axis along which these slices of one value partition it, in any widths, and its parts in order; else None."""
    found = sorted(((span, node) for node in slices if (span := span_of_slice(node)) is not None), key=lambda x: x[0])
    shape = sizes(slices[0].inputs[0])
    if len(found) < len(slices) or len({span[0] for span, _ in found}) != 1 or shape is None:
        return None
    axis = found[0][0][0]
    ends = [0, *(span[2] for span, _ in found)]
    whole = [span[1] for span, _ in found] == ends[:-1] and ends[-1] == shape[axis]
    return (axis, [node.outputs[0] for _, node in found]) if whole else None


def _obstacle(ranges: list[tuple[int, int, int]], shape: list[int | None] | None) -> str | None:
    size = shape[ranges[0][0]] if shape else None
    covered = [0, *(end for _, _, end in ranges)]
    if [start for _, start, _ in ranges] != covered[:-1] or covered[-1] != size:
        return "the slices overlap or leave a gap"
    if len({end - start for _, start, end in ranges}) != 1:
        return "the slices differ in width"
    return f"more than {MAX_PARTS} slices" if len(ranges) > MAX_PARTS else None
