"""Do the graphs quantise inputs of layers, and outputs, with the scales that the reference uses, bit for bit?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import TensorProto

from qexport.scheme import PerStep, PerToken
from qexport.solution import LEAST_TOKEN_SCALE, Activation
from qexport.verify.checks import NOWHERE, Check, Place, at_most
from qexport.verify.onnx_file import OnnxFile
from qexport.verify.quantisers import Quantiser, output_quantiser_of, quantiser_of
from qexport.verify.weights import Layer

NAME = "quantised inputs that differ"
OUTPUTS = "quantised outputs that differ"


def check_activations(
    graphs: Mapping[str, OnnxFile],
    layers: Iterable[Layer],
    activations: Mapping[str, Activation],
    per_step: Sequence[str],
) -> Check:
    """Whether the input of each layer is quantised as the reference does; the figure counts layers where it is not.

    `per_step` lists the layers with scales of the step, in the order of the port's elements. Whether the plan feeds
    the right ones is for `check_plan`.
    """
    places = {layer.name: layer for layer in layers}
    problems: list[tuple[Place, str]] = []
    for name, activation in activations.items():
        layer = places[name]
        element = per_step.index(name) if name in per_step else None
        problem = _problem(graphs.get(layer.graph), layer, activation, element)
        if problem:
            problems.append((Place(layer.graph, name), problem))
    place, detail = problems[0] if problems else (NOWHERE, f"inputs of {len(activations)} layers, all as the reference")
    return at_most(NAME, len(problems), 0, place, detail, "layers")


def check_outputs(graphs: Mapping[str, OnnxFile], layers: Iterable[Layer], outputs: Mapping[str, Activation]) -> Check:
    """Whether the output of each convolution is quantised as the reference does; the figure counts where it is not."""
    places = {layer.name: layer for layer in layers}
    problems: list[tuple[Place, str]] = []
    for name, output in outputs.items():
        layer = places[name]
        file = graphs.get(layer.graph)
        users = file.users(layer.weight) if file is not None else []
        found = [output_quantiser_of(file, node) for node, _ in users] if file is not None else []
        texts = [one if isinstance(one, str) else _difference(one, output, None) for one in found]
        problem = next(filter(None, texts), "") if texts else "the layer is not in the graph"
        if problem:
            problems.append((Place(layer.graph, name), problem))
    place, detail = problems[0] if problems else (NOWHERE, f"outputs of {len(outputs)} layers, all as the reference")
    return at_most(OUTPUTS, len(problems), 0, place, detail, "layers")


def _problem(file: OnnxFile | None, layer: Layer, activation: Activation, element: int | None) -> str:
    users = file.users(layer.weight) if file is not None else []
    if file is None or not users:
        return "the layer is not in the graph"
    for node, _ in users:
        found = quantiser_of(file, node)
        problem = found if isinstance(found, str) else _difference(found, activation, element)
        if problem:
            return problem
    return ""


def _difference(found: Quantiser, wanted: Activation, element: int | None) -> str:
    wanted_type = TensorProto.DataType.Value(str(wanted.spec.format.onnx_type))
    if found.type != wanted_type:
        return f"codes are {TensorProto.DataType.Name(found.type)}, not {wanted.spec.format.onnx_type}"
    if found.zero_point != wanted.zero_point:
        return f"its zero point is {found.zero_point}, not {wanted.zero_point}"
    match wanted.spec.scales:
        case PerToken():
            if found.token != (np.float32(wanted.spec.format.greatest), np.float32(LEAST_TOKEN_SCALE)):
                return "its scales are not those of each token"
        case PerStep():
            if element is None or found.element != element:
                return f"it takes element {found.element} of the step's scales, not {element}"
        case _:
            if found.scale is None or found.scale.tobytes() != np.asarray(wanted.scale).tobytes():
                return f"its scale is {found.scale}, not {wanted.scale}"
    return ""
