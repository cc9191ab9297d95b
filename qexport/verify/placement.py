"""Placement: which provider ran which node, what ONNX Runtime fused, and whether anything fell back to the CPU.

Nothing is inferred from what ONNX Runtime promises. Each graph is loaded once more with profiling on and with the
optimised model saved to a temporary folder, and one small batch is generated. The profile says on which provider each
node ran; the saved model says what became of each quantised layer, also of those that lowering joined with others. What
becomes of a layer is held against the rules of its provider (`qexport.targets.fusion`): one that should have been fused
and dequantises its weight at every run is a silent loss of speed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, NodeProto

from qexport.bundle import Bundle
from qexport.runtime import Player
from qexport.runtime.inputs import label_input
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import choose_provider, model_of, open_session, session_options
from qexport.targets import FUSED_FORMS, SessionConfig, session_config
from qexport.targets.fusion import (
    INTEGER_CONVOLUTION,
    INTEGER_TARGETS,
    PRODUCTS,
    integer_convolution,
    use_of,
    weight_of,
)
from qexport.targets.keys import JOINED_KEY
from qexport.verify.checks import NOWHERE, Check, Place, at_most

__all__ = ["GraphPlacement", "Placement", "check_fusion", "measure_placement", "surprises", "weight_of"]

PROFILED_BATCH = 2
"""Images of the profiled run. Two, since a batch of one may take other kernels."""

REAL_TYPES = ("float", "float16", "bfloat16", "double")
"""Of tensors, as profiles call them."""

LARGEST_SETTING = 1024
"""Numbers of a tensor that may be a setting of the sampler; ONNX Runtime rightly keeps the arithmetic of shapes and of
single numbers on the CPU. Maps, matrices and rows of logits have more, and moving them costs more than any kernel."""

UNFUSED = "not fused: dequantised at every run"
AT_LOAD = "weight dequantised at load"
MISSING = "not found in the optimised graph"

INTEGER_WEIGHT = 3
"""Which input of a `QLinearConv` is its weight."""

FOLDED = "FusedBack_"
"""ONNX Runtime's prefix of constants that it converted on a provider without a kernel for their type."""

_PREPARING = frozenset(("DequantizeLinear", "Cast", "Reshape", "Sub", "Mul"))
"""Operators that make a weight out of its codes, where that was not folded at load."""

_SUFFIX = "_kernel_time"
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class GraphPlacement:
    """One graph under one option set.

    `nodes` counts the nodes that ran, by provider; `ops` counts the node types after optimisation; `forms` maps each
    quantised layer to what multiplies by its weight; `fallback` has the op type and name of each node that ran on the
    CPU although another provider was asked for, and `heavy` those of them that took or made large real tensors.
    """

    nodes: Mapping[str, int]
    ops: Mapping[str, int]
    forms: Mapping[str, str]
    fallback: Sequence[tuple[str, str]] = ()
    heavy: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Placement:
    """All graphs of a bundle on one provider, by option set (``"exact"``, ``"serve"``) and graph.

    `target` is the one that they were lowered to; None of the portable ones.
    """

    provider: str
    graphs: Mapping[str, Mapping[str, GraphPlacement]] = field(default_factory=dict)
    target: str | None = None

    @property
    def fallback(self) -> list[tuple[str, str, str]]:
        """Graph, op type and name of the nodes that fell back to the CPU under ``serve``."""
        return [(name, *node) for name, graph in self.graphs.get("serve", {}).items() for node in graph.fallback]

    @property
    def heavy(self) -> list[tuple[str, str, str]]:
        """Those of `fallback` that took or made real tensors of more than `LARGEST_SETTING` numbers."""
        return [(name, *node) for name, graph in self.graphs.get("serve", {}).items() for node in graph.heavy]

    def forms(self, options: str = "serve") -> dict[str, str]:
        """What multiplies by each quantised layer's weight."""
        return {layer: form for graph in self.graphs.get(options, {}).values() for layer, form in graph.forms.items()}

    def surprises(self, rows: Iterable[Mapping[str, Any]], options: str = "serve") -> list[tuple[str, str]]:
        """See `surprises`."""
        return surprises(rows, self.forms(options), self.provider, self.target)

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``provider``, ``cuda`` (a sentence where it was not measured), and per option set and graph."""
        data: dict[str, Any] = {"provider": self.provider, "fallback": [list(node) for node in self.fallback]}
        if self.provider != "cuda":
            data["cuda"] = "not measured on CUDA"
        for options, graphs in self.graphs.items():
            data[options] = {
                name: {
                    "nodes": dict(graph.nodes),
                    "ops": dict(graph.ops),
                    "forms": dict(Counter(graph.forms.values())),
                    "layers": dict(graph.forms),
                }
                for name, graph in graphs.items()
            }
        return data


def measure_placement(
    bundle: Bundle, provider: str, option_sets: Sequence[str] = ("exact", "serve"), target: str | None = None
) -> Placement:
    """Run one small batch under each option set and see what ran where.

    Raises:
        BundleError: a graph cannot be loaded or run.
        InputError: the provider cannot be used here.
    """
    chosen = choose_provider(provider)
    graphs = {options: _measure(bundle, chosen, options, target) for options in option_sets}
    return Placement(chosen, graphs, target)


def _measure(bundle: Bundle, provider: str, options: str, target: str | None) -> dict[str, GraphPlacement]:
    files = bundle.graph_files(target)
    configs = {name: session_config(provider, options, quant_traits(bundle.manifest, name)) for name in files}
    weights = {name: [row for row in bundle.manifest.layers if row.get("algorithm") and row.get("graph") == name]
               for name in bundle.plan.graphs}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qexport-placement-") as folder:
        sessions = {name: _profiled_session(file, bundle, configs[name], Path(folder)) for name, file in files.items()}
        port = label_input(bundle.plan)
        inputs = {port.name: np.arange(PROFILED_BATCH) % bundle.manifest.model.num_classes} if port else {}
        device = next(iter(configs.values())).device
        Player(bundle.plan, OrtBackend(sessions, device), bundle.tables()).play(inputs, batch=PROFILED_BATCH)
        found = {}
        for name, session in sessions.items():
            ran = _ran(Path(session.end_profiling()))
            optimised = onnx.load(str(Path(folder) / f"{name}.onnx"), load_external_data=False)
            joined = joined_weights(files[name])
            fallen = [
                (node.op_type, key) for key, node in ran.items() if node.provider == _CPU != configs[name].provider
            ]
            found[name] = GraphPlacement(
                nodes=dict(Counter(node.provider for node in ran.values()).most_common()),
                ops=dict(Counter(node.op_type for node in optimised.graph.node).most_common()),
                forms={str(row["name"]): _form(optimised.graph, weight_of(row), joined) for row in weights[name]},
                fallback=sorted(fallen),
                heavy=sorted((op, node) for op, node in fallen if ran[node].large),
            )
        return found


def _profiled_session(file: Path, bundle: Bundle, config: SessionConfig, folder: Path) -> onnxruntime.InferenceSession:
    options = session_options(config)
    options.optimized_model_filepath = str(folder / file.name)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{file.stem}.data")
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / file.stem)
    return open_session(model_of(file, bundle.path, options), options, config, str(file))


@dataclass(frozen=True)
class _Ran:
    """A node that ran; `large`: it took or made a real tensor of more than `LARGEST_SETTING` numbers."""

    op_type: str
    provider: str
    large: bool


def _ran(profile: Path) -> dict[str, _Ran]:
    """Every node that the profile saw running, by name."""
    found: dict[str, _Ran] = {}
    for event in json.loads(profile.read_text()):
        facts = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX) and "provider" in facts:
            name = event["name"].removesuffix(_SUFFIX)
            before = name in found and found[name].large
            found[name] = _Ran(facts["op_name"], facts["provider"], before or _is_large(facts))
    return found


def _is_large(facts: Mapping[str, Any]) -> bool:
    tensors = [*facts.get("input_type_shape", ()), *facts.get("output_type_shape", ())]
    return any(
        kind in REAL_TYPES and math.prod(shape) > LARGEST_SETTING for one in tensors for kind, shape in one.items()
    )


def joined_weights(file: Path) -> dict[str, str]:
    """Initialiser → that of the joined weight which it lies in now, as the lowered graph says of itself."""
    model = onnx.load(str(file), load_external_data=False)
    found = next((entry.value for entry in model.metadata_props if entry.key == JOINED_KEY), "{}")
    return {part: name for name, parts in json.loads(found).items() for part in parts}


def _form(graph: GraphProto, weight: str, joined: Mapping[str, str]) -> str:
    """What became of the product with this weight: fused nodes call their weight after it."""
    name = joined.get(weight, weight)
    suffix = "" if name == weight else f", in one product of {list(joined.values()).count(name)} layers"
    made = {output for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in _PREPARING or len(node.input) < 2:
            continue
        source = _source(graph, node.input[INTEGER_WEIGHT if node.op_type == INTEGER_CONVOLUTION else 1])
        second = source.removeprefix(FOLDED)
        if second == name or second.startswith((f"{name}_", f"{name}/")):
            return _described(node, second, name, source in made) + suffix
    return MISSING


def _described(node: NodeProto, second: str, weight: str, computed: bool) -> str:
    values = {a.name: a.i for a in node.attribute}
    if node.op_type == "MatMulNBits":
        level = values.get("accuracy_level", 0)
        activations = "int8 activations" if level == 4 else "float activations"
        return f"MatMulNBits ({values['bits']} bit, block {values['block_size']}, {activations})"
    if computed and second.startswith(f"{weight}/"):
        return f"DequantizeLinear + {node.op_type}, {UNFUSED}"
    return f"{node.op_type}, {AT_LOAD}" if second.startswith(f"{weight}/") else node.op_type


def _source(graph: GraphProto, name: str) -> str:
    """The value behind casts that a provider without a kernel for a type puts around its nodes."""
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    while name in casts:
        name = casts[name]
    return name


def check_fusion(placement: Placement, layers: Iterable[Mapping[str, Any]]) -> Check:
    """A check that no layer of the manifest's table lost its kernel in silence, under ``serve``."""
    rows = [row for row in layers if row.get("algorithm")]
    found = placement.surprises(rows)
    counts = Counter(placement.forms("serve").values()).most_common()
    detail = ", ".join(f"{count} × {form}" for form, count in counts) or "no quantised layers"
    place = NOWHERE
    if found:
        graph = next((str(row["graph"]) for row in rows if str(row["name"]) == found[0][0]), "")
        place, detail = Place(graph), f"{found[0][0]}: {found[0][1]}; {detail}"
    return at_most("quantised layers without the kernel that they should have", len(found), 0, place, detail, "layers")


def surprises(
    rows: Iterable[Mapping[str, Any]], forms: Mapping[str, str], provider: str, target: str | None = None
) -> list[tuple[str, str]]:
    """Layers that should have been fused, by the provider's rules, and are dequantised at every run; with their form.

    Also matrices that cannot be found, of which nothing is proven. Convolutions in floating point may be: no provider
    fuses them, and blocked kernels keep their weights under names of their own. Those that `target` has integer
    operators for must be such.
    """
    expected = FUSED_FORMS.get(provider)
    found = []
    for row in rows:
        form = forms.get(str(row.get("name")), MISSING)
        use = use_of(row)
        fuses = expected is not None and expected(use).kernel is not None
        if target in INTEGER_TARGETS and integer_convolution(row) and form != INTEGER_CONVOLUTION:
            found.append((str(row.get("name")), f"not an integer convolution: {form}"))
        elif (form == MISSING and use.operator in PRODUCTS) or (fuses and UNFUSED in form):
            found.append((str(row.get("name")), form))
    return found
