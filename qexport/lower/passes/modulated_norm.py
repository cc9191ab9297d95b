"""A norm and the modulation that follows become one norm whose scale and shift belong to the sample.

    LayerNormalization(x, 1) · s + b   →   LayerNormalization(x, s, b)      x (B, L, D); s and b (B, 1, D)

The standard operator lets scale and shift be broadcast, and ONNX Runtime's CUDA kernel does (from 1.21 on): adaLN
(Peebles & Xie 2023, section 3.2) is one kernel instead of three. A residual in front of the norm is then a sum of its
own again, because `SkipLayerNormalization` takes vectors only: `modulated` and `skip_norm` are two ways to spend the
same launches, and a target uses the one that was faster there.

Refused by name: a norm with a scale other than 1 or a shift, an axis other than the last, scale or shift of another
shape than (B, 1, D), and one sample that is modulated into several.

Legend: B samples, L tokens, D width.
"""

from __future__ import annotations

import onnx_ir as ir

from qexport.lower.rewrite import (
    Rewrite,
    add_node,
    constant,
    nodes,
    remove_unused,
    replace,
    sizes,
    sole_reader,
)


class ModulatedNorm(Rewrite):
    """See module."""

    name = "norm and modulation in one"

    def apply(self, graph: ir.Graph) -> None:
        """Rewrite every norm whose only reader scales it, and whose product is only shifted."""
        for norm in nodes(graph, "LayerNormalization"):
            scaled = sole_reader(norm.outputs[0], "Mul")
            shifted = sole_reader(scaled.outputs[0], "Add") if scaled is not None else None
            if scaled is None or shifted is None:
                continue
            scale, shift = _other(scaled, norm.outputs[0]), _other(shifted, scaled.outputs[0])
            reason = _obstacle(norm, scale, shift)
            if reason:
                self.refuse(norm, reason)
                continue
            name = f"{(shifted.name or '').rpartition('/')[0]}/ModulatedNorm.{len(self.rewritten)}"
            attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
            shape = sizes(norm.inputs[0])
            inputs = [norm.inputs[0], scale, shift]
            out = add_node(graph, shifted, "LayerNormalization", inputs, name, attributes, shapes=[shape])[0]
            replace(graph, shifted.outputs[0], out)
            remove_unused(graph, shifted.outputs[0])
            self.rewritten.append(norm.name or "")


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input of a node of two that is not `value`."""
    return next((source for source in node.inputs if source is not value), None)


def _obstacle(norm: ir.Node, scale: ir.Value | None, shift: ir.Value | None) -> str | None:
    x = sizes(norm.inputs[0])
    if x is None or len(x) != 3:
        return "not of three dimensions"
    if norm.attributes.get_int("axis", -1) not in (-1, 2):
        return "the norm is not over the last axis"
    own = constant(norm.inputs[1])
    if len(norm.inputs) > 2 or own is None or bool((own != 1).any()):
        return "the norm has a scale or a shift of its own"
    if x[2] is None or any(_shape(value) != (1, x[2]) for value in (scale, shift)):
        return "scale and shift are not one row for each sample"
    if x[0] == 1 and any((sizes(value) or [None])[0] != 1 for value in (scale, shift)):
        return "the norm is broadcast over the samples"  # the operator broadcasts scale and shift only
    return None


def _shape(value: ir.Value | None) -> tuple[int | None, int | None] | None:
    """Of (B, 1, D) the last two; None for another number of dimensions."""
    found = sizes(value)
    return (found[1], found[2]) if found is not None and len(found) == 3 else None
