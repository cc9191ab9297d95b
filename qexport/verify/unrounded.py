"""A bundle's graphs without the quantisers of activations, so that nothing amplifies rounding errors.

Everything else is what the bundle holds: the same weights from the same file, the same nodes, the same plan but for the
scales of the step. So what these graphs compute can be held to the limits of weight-only bundles.
"""

from __future__ import annotations

from collections.abc import Collection

from onnxruntime import OrtValue

from qexport.bundle import Bundle
from qexport.errors import BundleError
from qexport.family import Generator
from qexport.runtime import Player
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import make_session
from qexport.targets import QuantTraits, session_config
from qexport.verify.onnx_file import OnnxFile
from qexport.verify.probes import changed_session, without_rounding
from qexport.verify.quantisers import Quantiser, output_quantiser_of, quantiser_of
from qexport.verify.weights import Layer


def unrounded_player(
    bundle: Bundle,
    layers: list[Layer],
    activations: Collection[str],
    outputs: Collection[str],
    reference: Generator,
    provider: str,
) -> Player[OrtValue]:
    """A player with ``exact`` options of the changed graphs, by the plan of `reference`, which rounds no inputs either.

    `activations` and `outputs` name the layers whose inputs and outputs are quantised.

    Raises:
        BundleError: one of these is not quantised, or a graph cannot be loaded.
    """
    sessions = {}
    device = ""
    for graph, path in bundle.graph_files().items():
        traits = quant_traits(bundle.manifest, graph)
        mine = [layer for layer in layers if layer.graph == graph and layer.name in activations]
        config = session_config(provider, "exact", traits)
        device = config.device
        if not mine:
            sessions[graph] = make_session(path, bundle.path, config)
            continue
        file = OnnxFile(graph, path, bundle.path)
        inputs: dict[str, str] = {}
        restored: dict[str, str] = {}
        for layer in mine:
            for node, _ in file.users(layer.weight):
                quantiser = quantiser_of(file, node)
                if not isinstance(quantiser, Quantiser):
                    raise BundleError(f"graph {graph!r}: {layer.name}: {quantiser}")
                inputs[node.name] = quantiser.x
                if layer.name in outputs:
                    behind = output_quantiser_of(file, node)
                    if not isinstance(behind, Quantiser):
                        raise BundleError(f"graph {graph!r}: {layer.name}: {behind}")
                    restored[node.name] = behind.restored
        plain = QuantTraits(weight_only=traits.weight_only | traits.with_activations, convolution=traits.convolution)
        sessions[graph] = changed_session(bundle, graph, without_rounding(inputs, restored), provider, plain)
    return Player(reference.plan, OrtBackend(sessions, device), bundle.tables())
