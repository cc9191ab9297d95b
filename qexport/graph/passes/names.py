"""Name nodes and values after the modules they come from: ``blocks.3.ffn.fc2``, ``blocks.3.attn/Attention``.

The node that multiplies by a module's weight takes the module's own name; every other node is ``scope/OpType``, with a
number where a scope has several. A value is called after the node that makes it. The exporter's metadata (scopes, stack
traces with the paths of the exporting machine) is removed.

Needs: metadata of `torch.onnx.export`. Leaves true: names are unique, ports and initialisers keep theirs.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from qexport.graph.scopes import scopes_of

WEIGHT_SUFFIX = ".weight"


class ReadableNames(ir.passes.InPlacePass):
    """See module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename all nodes and inner values."""
        graph = model.graph
        wanted = [_wanted_name(node) for node in graph]
        total = Counter(wanted)
        seen: Counter[str] = Counter()
        ports = {id(value) for value in (*graph.inputs, *graph.outputs)}
        for node, name in zip(graph, wanted, strict=True):
            node.name = name if total[name] == 1 else f"{name}.{seen[name]}"
            seen[name] += 1
            node.metadata_props.clear()
            node.doc_string = None
            for i, value in enumerate(node.outputs):
                if id(value) not in ports:
                    value.name = f"{node.name}:{i}"
        for value in graph.initializers.values():
            value.metadata_props.clear()
        model.metadata_props.clear()
        graph.metadata_props.clear()
        return ir.passes.PassResult(model, True)


def _wanted_name(node: ir.Node) -> str:
    for value in node.inputs[1:2]:
        if node.op_type in ("MatMul", "Conv") and value is not None and value.is_initializer() and value.name:
            return value.name.removesuffix(WEIGHT_SUFFIX)
    scopes = [scope for scope in scopes_of(node)[:-1] if scope]
    return f"{scopes[-1]}/{node.op_type}" if scopes else node.op_type
