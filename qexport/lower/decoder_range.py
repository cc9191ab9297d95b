"""Whether a decoder's numbers fit into float16, measured on latents that the bundle's own model draws.

float16 ends at 65,504. What flows through an autoencoder depends on its weights and on its latents, and no rule bounds
it: some published ones overflow. So the bundle draws `IMAGES` images on the CPU with a fixed seed (a denoiser by its
schedule of the fewest steps), and the decoder runs on their latents in float32, rewritten as for the target. Measured
are

- every value that would be rounded to float16: what enters (parameters included) and what each node makes;
- of `Attention`, where scores are inside the node, their bound √max‖q‖² · √max‖k‖² · scale (Cauchy and Schwarz).

Refused where the greatest magnitude is above `LIMIT`: an eighth of float16's range is left for other images, for sums
before their bias, and for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from qexport.bundle import Bundle
from qexport.errors import UnsupportedError
from qexport.lower.graphs import read_graph, rewrite
from qexport.lower.passes.half import HalfPrecision, has_plain_weight
from qexport.lower.rewrite import CONTRIB, Rewrite, last_size, rank
from qexport.runtime import CallRecord, load
from qexport.runtime.inputs import label_input
from qexport.runtime.session import open_session, session_options
from qexport.targets import session_config
from qexport.targets.config import QuantTraits

IMAGES, SEED = 4, 0

HEADROOM = 8
LIMIT = float(np.finfo(np.float16).max) / HEADROOM
"""8,188: the greatest magnitude that is taken; see module."""

FOLDER_KEY = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class DecoderRange:
    """The `greatest` magnitude of all `values` that were measured, and the `node` (or input, or parameter) it is of."""

    greatest: float
    node: str
    limit: float
    values: int
    images: int
    seed: int
    schedule: str | None


def decoder_of(bundle: Bundle) -> str:
    """The graph that makes pictures of latents: the last one of the plan, which convolves.

    Raises:
        UnsupportedError: there is none, or its convolutions are quantised.
    """
    name = bundle.plan.calls[-1].graph
    convolutions = [node for node in read_graph(bundle.graph_files()[name]).graph if node.op_type == "Conv"]
    if not convolutions or {call.graph for call in bundle.plan.calls} == {name}:
        raise UnsupportedError(f"{bundle.path}: its plan does not end in a decoder; leave --decoder-dtype out")
    if not all(map(has_plain_weight, convolutions)):
        raise UnsupportedError(f"{bundle.path}: its decoder is quantised, so it cannot compute in float16")
    return name


def measure_range(bundle: Bundle, graph: str, rewrites: Sequence[Rewrite]) -> DecoderRange:
    """Draw latents, run the decoder `graph` on them in float32, and tell its greatest magnitude.

    Raises:
        UnsupportedError: it is above `LIMIT`, or something cannot be measured.
        BundleError: the bundle cannot be loaded.
    """
    model = read_graph(bundle.graph_files()[graph])
    rewrite(model, rewrites)
    proto, names = _with_magnitudes(model, *HalfPrecision(convolutional=True).values(model.graph))
    latents, schedule = _draw(bundle, graph)
    config = session_config("cpu", "serve", QuantTraits())
    options = session_options(config)
    options.add_session_config_entry(FOLDER_KEY, str(bundle.path.resolve()))
    session = open_session(proto.SerializeToString(), options, config, graph)
    greatest, node = 0.0, ""
    for feeds in latents:
        for name, value in zip(names.values(), session.run(list(names), feeds), strict=True):
            magnitude = float(np.asarray(value))
            if not magnitude <= greatest:  # also of what is no number
                greatest, node = magnitude, name
    if not greatest <= LIMIT:
        raise UnsupportedError(
            f"{bundle.path}: the decoder reaches {greatest:,.0f} at {node}, float16 takes {LIMIT:,.0f}"
            f" (an eighth of its range); leave it in float32"
        )
    return DecoderRange(greatest, node, LIMIT, len(names), IMAGES, SEED, schedule)


def _draw(bundle: Bundle, graph: str) -> tuple[list[dict[str, np.ndarray]], str | None]:
    """What the decoder is given for each image, and the schedule that drew it."""
    runtime = load(bundle.path, provider="cpu", check="size")
    player, plan = runtime.player, bundle.plan
    schedule = None
    if plan.schedules:
        schedule = min(plan.schedules, key=lambda name: plan.tables[plan.schedules[name]].shape[0])
        player = player.with_schedule(schedule)
    found: list[dict[str, np.ndarray]] = []

    def observe(record: CallRecord) -> None:
        if record.graph == graph:
            found.append({port: np.array(player.backend.get(value)) for port, value in record.feeds.items()})

    labels = np.linspace(0, max(bundle.manifest.model.num_classes - 1, 0), IMAGES).astype(np.int64)
    port = label_input(plan)
    player.play({port.name: labels} if port else {}, seed=SEED, batch=IMAGES, observer=observe)
    return found, schedule


def _with_magnitudes(
    model: ir.Model, inside: Sequence[ir.Node], values: Sequence[ir.Value]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph with the greatest magnitude of each value as an output, and what each of these outputs is of."""
    proto = ir.serde.serialize_model(model)
    names: dict[str, str] = {}

    def add_output(name: str, of: str) -> None:
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        names[name] = of

    def add_nodes(*nodes: onnx.NodeProto) -> None:
        proto.graph.node.extend(nodes)

    for i, value in enumerate(values):
        maker = value.producer()
        absolute, name = f"range.{i}.abs", f"range.{i}"
        add_nodes(
            helper.make_node("Abs", [value.name or ""], [absolute]),
            helper.make_node("ReduceMax", [absolute], [name], keepdims=0),
        )
        add_output(name, (maker.name if maker is not None else value.name) or "")
    for i, node in enumerate(node for node in inside if node.op_type == "Attention"):
        if node.domain == CONTRIB:
            raise UnsupportedError(f"the scores of {node.name} cannot be measured; leave the decoder in float32")
        name, scale = f"scores.{i}", f"scores.{i}.scale"
        proto.graph.initializer.append(helper.make_tensor(scale, TensorProto.FLOAT, [], [_scale(node)]))
        squares = [f"{name}.{part}" for part in "qk"]
        for value, square in zip(node.inputs[:2], squares, strict=True):
            assert value is not None
            axis = f"{square}.axis"
            proto.graph.initializer.append(helper.make_tensor(axis, TensorProto.INT64, [1], [-1]))
            add_nodes(
                helper.make_node("ReduceL2", [value.name or "", axis], [f"{square}.norms"], keepdims=0),
                helper.make_node("ReduceMax", [f"{square}.norms"], [square], keepdims=0),
            )
        add_nodes(
            helper.make_node("Mul", squares, [f"{name}.product"]),
            helper.make_node("Mul", [f"{name}.product", scale], [name]),
        )
        add_output(name, f"the scores of {node.name}")
    return proto, names


def _scale(node: ir.Node) -> float:
    """What an `Attention` multiplies its scores by."""
    given = node.attributes.get_float("scale", 0.0)
    width = last_size(node.inputs[0])
    if given or width is None:
        return given or 1.0
    heads = node.attributes.get_int("q_num_heads", 1) if rank(node.inputs[0]) == 3 else 1
    return 1 / math.sqrt(width / heads)
