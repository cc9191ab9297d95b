"""The models that a bundle is compared with: the full-precision one it was made of, and its quantised torch twin.

The twin is the reference of parity. It holds what the recipe in the bundle makes of the checkpoint, computed anew, so a
bundle whose files were exchanged does not get to say what is right. What calibration found cannot be computed anew: it
is read from the bundle, and whatever can be asked of it without calibrating again is asked
(`qexport.verify.solved_codes`, `qexport.verify.trained_floats`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qexport.bundle import Bundle, ModelInfo
from qexport.bundle.calibration import read_calibration
from qexport.errors import BundleError, CheckpointError, InputError
from qexport.family import Generator, find_model, load_random, random_seed
from qexport.graph.step_scales import per_step_layers
from qexport.numerics.quantized import QuantizedTensor
from qexport.plan import Plan
from qexport.quantize import StoredWeight, assign_rules, output_specs, places_of
from qexport.recipe import Rule
from qexport.recipe_toml import read_recipe
from qexport.reference.twin import quantised_twin
from qexport.solution import Activation
from qexport.verify.checks import NOWHERE, Check, Place, at_most
from qexport.verify.onnx_file import OnnxFile
from qexport.verify.solved_codes import SolvedCodes, judge, must_be_read, read_codes, trained_graph
from qexport.verify.trained_floats import TrainedFloat, judge_float, listed_floats, read_float
from qexport.verify.weights import Layer


@dataclass(frozen=True)
class Models:
    """`full` precision, `quantised` reference, and the layers that the recipe quantises.

    `unrounded` is the reference without quantised inputs of layers, the same object where there are none. `activations`
    say how those are quantised, by layer, `outputs` the same of what comes out of convolutions; `per_step` lists the
    layers with scales of the step; `solved` is what was found of codes that had to be read from the bundle, `floats` of
    other parameters that were trained.
    """

    full: Generator
    quantised: Generator
    layers: list[Layer]
    unrounded: Generator
    activations: Mapping[str, Activation] = field(default_factory=dict)
    per_step: tuple[str, ...] = ()
    solved: tuple[SolvedCodes, ...] = ()
    floats: tuple[TrainedFloat, ...] = ()
    outputs: Mapping[str, Activation] = field(default_factory=dict)


def load_models(
    bundle: Bundle, generator: Generator | None, checkpoint: str | None, vae_checkpoint: str | None
) -> Models | str:
    """Load both models, or say in words why the rungs that need them are skipped.

    Args:
        bundle: names the model, and holds the recipe and the hashes of the checkpoint files.
        generator: the full-precision model, if it is loaded already; it is not changed.
        checkpoint: file of the generator's weights, where it is neither bundled nor downloaded.
        vae_checkpoint: file of the decoder's weights.

    Raises:
        CheckpointError: a file that was named explicitly cannot be used.
        BundleError: what calibration found is missing from the bundle, or damaged.
    """
    if generator is None:
        try:
            generator = _load(bundle.manifest.model, checkpoint, vae_checkpoint)
        except InputError as error:
            if isinstance(error, CheckpointError) and (checkpoint or vae_checkpoint):
                raise
            return str(error)
    reason = _other_checkpoint(generator.checkpoint_sha256, bundle.manifest.checkpoints)
    if reason:
        return reason
    try:
        recipe = read_recipe(bundle.path / bundle.manifest.recipe)
        rules = assign_rules(generator, recipe)
    except InputError as error:
        return f"the recipe in the bundle cannot be replayed: {error}"
    calibrated = read_calibration(bundle.path, rules, output_specs(generator, rules))
    smooth, activations = calibrated.smooth, calibrated.activations
    trained = trained_graph(bundle.manifest)
    trained_floats = _floats(bundle, generator)
    solution = replace(calibrated, weights=_codes(bundle, generator, rules), floats=trained_floats)
    layers: list[Layer] = []
    solved: list[SolvedCodes] = []
    floats: list[TrainedFloat] = []

    def note(weight: StoredWeight) -> None:
        if weight.trained:
            floats.append(judge_float(weight))
        if weight.layer is None or weight.rule is None or weight.rule.weight is None:
            return
        layers.append(Layer(weight.layer, weight.graph, weight.name, weight.rule.activation is not None))
        found = judge(weight, weight.graph == trained)
        if found is not None:
            solved.append(found)

    try:
        twin = quantised_twin(generator, recipe, solution, note)
    except BundleError:
        raise
    except InputError as error:
        if smooth or activations or trained_floats:  # the recipe fits the model, so it is what was found that does not
            raise BundleError(
                f"{bundle.path}: what calibration or training found does not fit the model: {error}"
            ) from error
        return f"the recipe in the bundle cannot be replayed: {error}"
    stepped = per_step_layers(generator, activations)
    return Models(
        generator, twin.quantised, layers, twin.unrounded, activations, stepped, tuple(solved), tuple(floats),
        solution.outputs,
    )  # fmt: skip


def _codes(bundle: Bundle, generator: Generator, rules: Mapping[str, Rule]) -> dict[str, QuantizedTensor]:
    """The codes of every layer whose algorithm saw inputs or that was trained, from the bundle."""
    trained, places = trained_graph(bundle.manifest), places_of(generator, rules)
    wanted = {layer: rule for layer, rule in rules.items() if must_be_read(rule, places[layer][0] == trained)}
    if not wanted:
        return {}
    files = {name: OnnxFile(name, path, bundle.path) for name, path in bundle.graph_files().items()}
    parameters = {spec.name: spec.parameters() for spec in generator.graphs}
    found = {}
    for layer, (graph, weight) in places_of(generator, wanted).items():
        spec = wanted[layer].weight
        if graph not in files:
            raise BundleError(f"{bundle.path}: has no graph {graph!r}; quantise again")
        assert spec is not None
        found[layer] = read_codes(files[graph], weight, spec, tuple(parameters[graph][weight].shape))
    return found


def _floats(bundle: Bundle, generator: Generator) -> dict[str, np.ndarray]:
    """The parameters that the manifest lists as trained in floating point, from the bundle, by ``graph/name``."""
    names = listed_floats(bundle.manifest)
    if not names:
        return {}
    graph = trained_graph(bundle.manifest)
    path, spec = bundle.graph_files().get(str(graph)), {spec.name: spec for spec in generator.graphs}.get(str(graph))
    if path is None or spec is None:
        raise BundleError(f"{bundle.path}: has no graph {graph!r}; quantise again")
    file, parameters = OnnxFile(spec.name, path, bundle.path), spec.parameters()
    found = {}
    for name in names:
        if name not in parameters:
            raise BundleError(f"{bundle.path}: {name!r} was trained, which the model does not have; quantise again")
        found[f"{graph}/{name}"] = read_float(file, name, tuple(parameters[name].shape))
    return found


def _load(model: ModelInfo, checkpoint: str | None, vae_checkpoint: str | None) -> Generator:
    seed = random_seed(model.source)
    if seed is not None:
        return load_random(model.name, seed)
    family, entry = find_model(model.name)
    return family.load(entry, checkpoint, vae_checkpoint)


def check_plan(bundle: Bundle, reference: Generator) -> Check:
    """Whether the bundle's sampling plan and its tables are the model's. The figure counts what differs."""
    ours, theirs = _plain(reference.plan), _plain(bundle.plan)
    different = [f"plan.{key}" for key in ours if ours[key] != theirs.get(key)]
    tables = bundle.tables()
    for name, wanted in reference.tables.items():
        if name not in tables or not np.array_equal(tables[name], wanted) or tables[name].dtype != wanted.dtype:
            different.append(f"table {name}")
    detail = f"{', '.join(different[:3])}" if different else f"the same, with {len(tables)} tables"
    place = Place(node=different[0]) if different else NOWHERE
    return at_most("sampling plan: parts that differ", len(different), 0, place, detail, "parts")


def _other_checkpoint(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    for role, digest in wanted.items():
        if found.get(role) != digest:
            return (
                f"the {role} checkpoint at hand (SHA-256 {str(found.get(role))[:12]}…) is not the one that the bundle "
                f"was made of ({digest[:12]}…)"
            )
    return ""


def _plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it, without the places of its tables."""
    data = json.loads(json.dumps(plan.to_json()))
    data["tables"] = {name: (table["dtype"], table["shape"]) for name, table in data["tables"].items()}
    return data
