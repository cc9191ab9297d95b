"""Rung "operators": each layer with a quantised input, as the provider's kernel multiplies it, against float64.

In a copy of the graph under ``exact`` options, the float input x of a layer's quantiser and its product y are made
outputs. x is what the kernel really saw, so nothing that happened before matters; the codes of x are chosen in NumPy by
the definition in `qexport.solution.Activation`, and y must be the product of the dequantised numbers. This is where
integer kernels that saturate, wrong zero points and wrong scales show, layer by layer.

Limit. Codes are whole numbers that float32 holds exactly, so a kernel errs by summing K products (a random walk of
roundings, at most about u·√K/2 relative, u = 2⁻²⁴: 2e-6 for K = 4608) and by a few roundings of scales.
`OPERATOR_RELATIVE_L2` leaves a factor of five. The defects it is for begin at 1e-3: a zero point off by one moves x by
one step of at most 256, a kernel that saturates in 16 bits was measured at 1e-2.

Legend: T tokens, K inputs, N outputs of a matrix; B images, C channels, O outputs, H W map, k k window of a
convolution, P positions of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from onnx import NodeProto
from onnxruntime import InferenceSession
from torch import Tensor

from qexport.bundle import Bundle
from qexport.errors import BundleError
from qexport.family import Generator
from qexport.reference.backend import torch_player
from qexport.runtime import CallRecord
from qexport.runtime.runtime import quant_traits
from qexport.scheme import PerStep, PerToken
from qexport.solution import LEAST_TOKEN_SCALE, Activation
from qexport.verify.checks import Check, Place, at_most
from qexport.verify.differences import Sums
from qexport.verify.onnx_file import OnnxFile, attribute
from qexport.verify.probes import changed_session, exposing
from qexport.verify.quantisers import PORT, Quantiser, quantiser_of
from qexport.verify.trajectory import label_inputs, labels_for
from qexport.verify.weights import Layer

NAME = "quantised operators: relative L2 against float64"

OPERATOR_RELATIVE_L2 = 1e-5
"""See module."""

IMAGES = 2
CALLS = 10
"""Iterations of each of the plan's calls that are looked at, spread evenly over all."""

SAMPLED_ROWS = 128
"""Tokens, or positions of a map, for which the product is computed in float64, spread evenly over all."""

LAYERS_AT_A_TIME = 16
"""Layers whose inputs and products are held at a time."""


_FLOAT8 = {"fp8-e4m3": ml_dtypes.float8_e4m3fn, "fp8-e5m2": ml_dtypes.float8_e5m2}


@dataclass(frozen=True)
class Probe:
    """A node of a layer with a quantised input, how that is rounded, and what it is multiplied by.

    `bias` is a convolution's, which has it inside the operator.
    """

    layer: Layer
    node: NodeProto
    x: str
    activation: Activation
    element: int | None
    weight: np.ndarray
    bias: np.ndarray | None


@dataclass
class _Found:
    worst: float = 0.0
    place: Place = field(default_factory=Place)
    products: int = 0


def check_operators(
    bundle: Bundle,
    files: Mapping[str, OnnxFile],
    layers: list[Layer],
    activations: Mapping[str, Activation],
    per_step: tuple[str, ...],
    reference: Generator,
    provider: str,
    *,
    seed: int,
    schedule: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Play a few images on the reference, and put its feeds to every quantised operator; the figure is the worst's.

    Raises:
        BundleError: a layer's input is not quantised, or a graph fails.
    """
    probes: dict[str, list[Probe]] = {}
    for layer in layers:
        if layer.name in activations:
            element = per_step.index(layer.name) if layer.name in per_step else None
            probes.setdefault(layer.graph, []).extend(_probes(files[layer.graph], layer, activations, element))
    sessions = {}
    for graph, some in probes.items():
        values = [name for probe in some for name in (probe.x, probe.node.output[0])]
        traits = quant_traits(bundle.manifest, graph)
        sessions[graph] = changed_session(bundle, graph, exposing(values), provider, traits)
    found = _Found()

    def visit(graph: str, feeds: Mapping[str, np.ndarray], iteration: int) -> None:
        some = probes[graph]
        for start in range(0, len(some), LAYERS_AT_A_TIME):
            _measure(sessions[graph], some[start : start + LAYERS_AT_A_TIME], feeds, iteration, found)

    with_feeds(reference, probes, visit, seed=seed, schedule=schedule, progress=progress)
    detail = f"{found.products} products of {sum(map(len, probes.values()))} layers, each on the input that it saw"
    return at_most(NAME, found.worst, OPERATOR_RELATIVE_L2, found.place, detail)


def with_feeds(
    reference: Generator,
    graphs: Collection[str],
    visit: Callable[[str, Mapping[str, np.ndarray], int], None],
    *,
    seed: int,
    schedule: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Play `IMAGES` images on the reference; `visit` gets what `CALLS` calls of a graph are fed, and their number."""
    player = torch_player(reference)
    if schedule is not None:
        player = player.with_schedule(schedule)
    chosen = {
        (number, int(iteration))
        for number, call in enumerate(player.plan.calls)
        for iteration in np.linspace(0, call.iterations - 1, min(CALLS, call.iterations)).round()
    }
    done = 0

    def observe(record: CallRecord[Tensor]) -> None:
        nonlocal done
        if record.graph not in graphs or (record.call, record.iteration) not in chosen:
            return
        visit(record.graph, {port: value.numpy() for port, value in record.feeds.items()}, record.iteration)
        done += 1
        if progress is not None:
            progress(done, len(chosen))

    labels = labels_for(IMAGES, reference.entry.num_classes)
    player.play(label_inputs(player.plan, labels), seed=seed, batch=IMAGES, observer=observe)


def _probes(file: OnnxFile, layer: Layer, activations: Mapping[str, Activation], element: int | None) -> list[Probe]:
    found = file.dequantized(layer.weight) if layer.weight in file.initializers else None
    out = []
    for node, _ in file.users(layer.weight):
        quantiser = quantiser_of(file, node)
        if found is None or not isinstance(quantiser, Quantiser):
            raise BundleError(f"graph {layer.graph!r}: the input or the weight of {layer.name!r} is not quantised")
        bias = file.constant(node.input[2]) if node.op_type == "Conv" and len(node.input) > 2 else None
        out.append(Probe(layer, node, quantiser.x, activations[layer.name], element, found.value, bias))
    return out


def _measure(
    session: InferenceSession, probes: list[Probe], feeds: Mapping[str, np.ndarray], iteration: int, found: _Found
) -> None:
    names = list(dict.fromkeys(name for probe in probes for name in (probe.x, probe.node.output[0])))
    given = [name for name in names if name in feeds]
    asked = [name for name in names if name not in feeds]
    try:
        results = session.run(asked, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise BundleError(f"graph {probes[0].layer.graph!r} failed: {str(error).splitlines()[0]}") from error
    values = {**dict(zip(asked, map(np.asarray, results), strict=True)), **{name: feeds[name] for name in given}}
    for probe in probes:
        scale = None if probe.element is None else feeds[PORT][probe.element]
        theirs, ours = _product(probe, values[probe.x], values[probe.node.output[0]], scale)
        sums = Sums()
        sums.add(theirs, ours)
        found.products += 1
        if not sums.relative_l2 <= found.worst:
            found.worst = sums.relative_l2
            found.place = Place(probe.layer.graph, probe.layer.name, iteration)


def _product(probe: Probe, x: np.ndarray, y: np.ndarray, scale: np.float32 | None) -> tuple[np.ndarray, np.ndarray]:
    """Sampled rows of the kernel's product, and of ours in float64."""
    if probe.node.op_type == "Conv":
        return convolution(probe, x, y, scale)
    x_TK, y_TN = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    rows = _spread(len(x_TK))
    return y_TN[rows], rounded(x_TK[rows], probe.activation, scale) @ probe.weight.astype(np.float64)


def rounded(x: np.ndarray, activation: Activation, step_scale: np.float32 | None = None) -> np.ndarray:
    """What codes make of x (…, K) float32, in float64: the quotient is float32, everything after it exact."""
    number_format = activation.spec.format
    match activation.spec.scales:
        case PerToken():
            greatest = np.abs(x).max(axis=-1, keepdims=True) / np.float32(number_format.greatest)
            scale = np.maximum(greatest, np.float32(LEAST_TOKEN_SCALE))
        case PerStep():
            assert step_scale is not None
            scale = np.float32(step_scale)
        case _:
            assert activation.scale is not None
            scale = activation.scale
    quotient = x / scale
    if number_format.kind == "float":
        held = np.clip(quotient, -np.float32(number_format.float_max), np.float32(number_format.float_max))
        values = held.astype(_FLOAT8[number_format.name]).astype(np.float64)
    else:
        codes = np.rint(quotient).astype(np.float64) + activation.zero_point
        values = np.clip(codes, number_format.code_min, number_format.code_max) - activation.zero_point
    return values * np.asarray(scale, np.float64)


def convolution(
    probe: Probe, x_BCHW: np.ndarray, y_BOHW: np.ndarray, scale: np.float32 | None
) -> tuple[np.ndarray, np.ndarray]:
    """Sampled positions of the first image, (O, P): of the map y, and of ours of the float input x, in float64.

    Raises:
        BundleError: a convolution of a kind that qexport never writes.
    """
    w_OCkk = probe.weight.astype(np.float64)
    lists = {a.name: list(a.ints) for a in probe.node.attribute}
    automatic = any(a.name == "auto_pad" and a.s != b"NOTSET" for a in probe.node.attribute)
    if automatic or attribute(probe.node, "group", 1) != 1 or set(lists.get("dilations", [1])) != {1}:
        raise BundleError(f"{probe.node.name!r}: verify reads no grouped, dilated or auto-padded convolutions")
    top, left, bottom, right = lists.get("pads", [0, 0, 0, 0])
    down, across = lists.get("strides", [1, 1])
    x_CHW = np.pad(rounded(x_BCHW[0], probe.activation, scale), ((0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x_CHW, w_OCkk.shape[2:], axis=(1, 2))[:, ::down, ::across]
    rows, columns = np.divmod(_spread(y_BOHW.shape[2] * y_BOHW.shape[3]), y_BOHW.shape[3])
    ours_OP = np.einsum("cpij,ocij->op", windows[:, rows, columns], w_OCkk)
    if probe.bias is not None:
        ours_OP += probe.bias[:, None]
    return y_BOHW[0][:, rows, columns], ours_OP


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED_ROWS)).round().astype(np.int64))
