"""Rung "integer convolutions": each ``QLinearConv`` of a lowered graph, as its kernel computes it, against float64.

In a copy of the lowered graph under ``exact`` options, what flows into each operator and the codes that it makes are
made outputs. Weights, bias, and the scales of inputs and outputs are taken from the reference and the portable graph,
not from what lowering wrote. e being the exact sum with the bias as it is, and c the code:

    |c − e / s_y|  ≤  ½ + ½ sₓ s_w / s_y + `SLACK`        unless c is the least or the greatest code and e beyond it

½ is the rounding itself, the second term that of the bias to a whole number of sₓ s_w (`qexport.lower.passes
.integer_convolution`), the third what float32 does to the factor sₓ s_w / s_y. The figure is the greatest share of this
bound that is used: 1 is met by numbers next to a border. A wrong scale, zero point or bias of any channel, or a kernel
that saturates, is off by whole steps.

Legend: O output channels, P sampled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnxruntime import InferenceSession

from qexport.bundle import Bundle
from qexport.errors import BundleError
from qexport.family import Generator
from qexport.runtime.runtime import quant_traits
from qexport.solution import Activation
from qexport.targets.fusion import INTEGER_CONVOLUTION
from qexport.verify.checks import Check, Place, at_most
from qexport.verify.onnx_file import OnnxFile
from qexport.verify.operators import Probe, convolution, with_feeds
from qexport.verify.probes import changed_session, exposing
from qexport.verify.weights import Layer

NAME = "integer convolutions: share of the bound on rounding"

SLACK = 128 * 2.0**-22
"""Steps. Three float32 roundings (sₓ s_w, its quotient by s_y, the product) of up to 2⁻²⁴ each, of 128 steps."""

OFFSET = 128
"""From an int8 code to the uint8 code of the same number."""

LEAST, GREATEST = -128, 127


@dataclass(frozen=True)
class _Operator:
    """One operator: `x` names its float input, or the codes of another one that it reads; `codes` what it makes."""

    probe: Probe
    x: str
    coded: bool
    codes: str
    y_scale: np.float32
    channel_scale: np.ndarray


def check_integer_convolutions(
    bundle: Bundle,
    target: str,
    portable: Mapping[str, OnnxFile],
    layers: list[Layer],
    activations: Mapping[str, Activation],
    outputs: Mapping[str, Activation],
    reference: Generator,
    provider: str,
    *,
    seed: int,
    schedule: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> Check | None:
    """Play a few images on the reference, and put its feeds to every such operator; None where there is none.

    Raises:
        BundleError: an operator has a weight that belongs to no quantised layer, or a graph fails.
    """
    known = {(layer.graph, layer.weight): layer for layer in layers}
    operators: dict[str, list[_Operator]] = {}
    sessions: dict[str, InferenceSession] = {}
    for graph, path in bundle.graph_files(target).items():
        lowered = OnnxFile(graph, path, bundle.path)
        made = [node for node in lowered.producers.values() if node.op_type == INTEGER_CONVOLUTION]
        if not made:
            continue
        some: list[_Operator] = []
        for node in made:
            layer = known.get((graph, node.input[3]))
            if layer is None or layer.name not in activations:
                raise BundleError(f"graph {graph!r}: {node.name!r} convolves with no quantised layer's weight")
            some.append(_operator(lowered, portable[graph], node.name, layer, activations, outputs))
        operators[graph] = some
        floats = [one.x for one in some if not one.coded]
        codes = {one.codes for one in some} | {one.x for one in some if one.coded}
        traits = quant_traits(bundle.manifest, graph)
        sessions[graph] = changed_session(bundle, graph, exposing(floats, codes), provider, traits, target)
    if not operators:
        return None
    worst, place, outside, total = 0.0, Place(), 0, 0

    def visit(graph: str, feeds: Mapping[str, np.ndarray], iteration: int) -> None:
        nonlocal worst, place, outside, total
        for one in operators[graph]:
            share, off, count = _share(sessions[graph], one, feeds)
            outside, total = outside + off, total + count
            if not share <= worst:
                worst, place = share, Place(graph, one.probe.layer.name, iteration)

    with_feeds(reference, operators, visit, seed=seed, schedule=schedule, progress=progress)
    count = sum(map(len, operators.values()))
    detail = f"{count} operators, each on the input that it saw; {outside} of {total} codes are not the nearest"
    return at_most(NAME, worst, 1.0, place, detail)


def _operator(
    lowered: OnnxFile,
    portable: OnnxFile,
    name: str,
    layer: Layer,
    activations: Mapping[str, Activation],
    outputs: Mapping[str, Activation],
) -> _Operator:
    node = next(node for node in lowered.producers.values() if node.name == name)
    found = portable.dequantized(layer.weight)
    original = next((user for user, _ in portable.users(layer.weight) if name.startswith(user.name)), None)
    scale = portable.constant(f"{layer.weight}_scale")
    if found is None or original is None or scale is None:
        raise BundleError(f"graph {layer.graph!r}: {name!r} is no convolution of the portable graph")
    bias = portable.constant(original.input[2]) if len(original.input) > 2 else None
    activation = activations[layer.name]
    quantize = lowered.producers.get(node.input[0])
    coded = quantize is None or quantize.op_type != "QuantizeLinear"
    x = node.input[0] if quantize is None or coded else quantize.input[0]
    # What a convolution with few channels makes is rounded as the input of the next one.
    y_scale = outputs[layer.name].scale if layer.name in outputs else lowered.constant(node.input[6])
    assert y_scale is not None
    probe = Probe(layer, node, x, activation, None, found.value, bias)
    return _Operator(probe, x, coded, node.output[0], np.float32(y_scale), scale.astype(np.float64).reshape(-1))


def _share(session: InferenceSession, one: _Operator, feeds: Mapping[str, np.ndarray]) -> tuple[float, int, int]:
    """The greatest share of the bound, how many codes are not the nearest to the exact number, and of how many."""
    asked = [name for name in (one.x, one.codes) if name not in feeds]
    try:
        values = {**feeds, **dict(zip(asked, map(np.asarray, session.run(asked, dict(feeds))), strict=True))}
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        text = str(error).splitlines()[0]
        raise BundleError(f"graph {one.probe.layer.graph!r} failed: {text}") from error
    x, activation = values[one.x], one.probe.activation
    assert activation.scale is not None
    if one.coded:
        x = (x.astype(np.float32) - OFFSET - activation.zero_point) * activation.scale
    codes = values[one.codes].astype(np.float64) - OFFSET
    code_OP, exact_OP = convolution(one.probe, x, codes, None)
    exact_OP = exact_OP / one.y_scale
    nearest_OP = np.clip(np.rint(exact_OP), LEAST, GREATEST)
    beyond_OP = (code_OP == nearest_OP) & (np.abs(code_OP - exact_OP) > 0.5)  # saturated, as they should be
    unit_O = one.channel_scale * float(activation.scale) / float(one.y_scale)
    bound_O1 = 0.5 + 0.5 * np.broadcast_to(unit_O, (len(code_OP),))[:, None] + SLACK
    share_OP = np.where(beyond_OP, 0.0, np.abs(code_OP - exact_OP) / bound_O1)
    return float(share_OP.max()), int((code_OP != nearest_OP).sum()), code_OP.size
