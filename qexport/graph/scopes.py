"""The exporter's record of which module a node came from: dotted paths, outermost first, the node's own name last."""

from __future__ import annotations

import ast

import onnx_ir as ir

_KEY = "pkg.torch.onnx.name_scopes"
_ARTEFACT = "_empty_nn_module_stack_from_metadata_hook"  # torch.export's stand-in where it knows no module


def scopes_of(node: ir.Node) -> list[str]:
    """The scopes of a node; empty strings stand for the outermost module."""
    text = node.metadata_props.get(_KEY)
    return [] if not text else ["" if scope == _ARTEFACT else scope for scope in ast.literal_eval(text)]


def set_scopes(node: ir.Node, scopes: list[str]) -> None:
    """Record the scopes of a node."""
    node.metadata_props[_KEY] = repr(scopes)
