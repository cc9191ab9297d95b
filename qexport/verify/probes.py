"""Changed copies of a bundle's graphs, made for a measurement and thrown away afterwards.

The copies hold no weights: they point into the bundle's own files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto
from onnxruntime import InferenceSession

from qexport.bundle import Bundle
from qexport.runtime.session import make_session
from qexport.targets import QuantTraits, session_config
from qexport.verify.quantisers import PORT


def changed_session(
    bundle: Bundle,
    graph: str,
    change: Callable[[GraphProto], None],
    provider: str,
    traits: QuantTraits,
    target: str | None = None,
) -> InferenceSession:
    """A session with ``exact`` options for a copy of `graph`, portable or of `target`, that `change` has edited.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    model = onnx.load(str(bundle.graph_files(target)[graph]), load_external_data=False)
    change(model.graph)
    with tempfile.TemporaryDirectory(prefix="qexport-probe-") as folder:
        path = Path(folder) / f"{graph}.onnx"
        path.write_bytes(model.SerializeToString())
        return make_session(path, bundle.path, session_config(provider, "exact", traits))


def without_rounding(
    inputs: Mapping[str, str], outputs: Mapping[str, str] | None = None
) -> Callable[[GraphProto], None]:
    """A change that feeds nodes (by name) what stands in front of their quantisers, and drops the latter.

    `outputs` tells of nodes whose output is quantised what that makes of it; they make it themselves then.
    """
    rounded = dict(outputs or {})

    def change(graph: GraphProto) -> None:
        for node in [node for node in graph.node if set(node.output) & set(rounded.values())]:
            graph.node.remove(node)
        for node in graph.node:
            if node.name in inputs:
                node.input[0] = inputs[node.name]
            if node.name in rounded:
                node.output[0] = rounded[node.name]
        _drop_unread(graph)

    return change


def exposing(values: Iterable[str], codes: Collection[str] = ()) -> Callable[[GraphProto], None]:
    """A change that makes float32 values outputs of the graph too, and `codes` in uint8."""

    def change(graph: GraphProto) -> None:
        known = {port.name for port in (*graph.output, *graph.input)}
        for name in dict.fromkeys((*values, *codes)):
            if name not in known:
                kind = TensorProto.UINT8 if name in codes else TensorProto.FLOAT
                graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))

    return change


def _drop_unread(graph: GraphProto) -> None:
    needed = {port.name for port in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):  # a graph is sorted, so readers come after what they read
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for tensor in [t for t in graph.initializer if t.name not in needed]:
        graph.initializer.remove(tensor)
    for port in [p for p in graph.input if p.name == PORT and p.name not in needed]:
        graph.input.remove(port)
