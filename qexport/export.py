"""From a loaded model and what was decided about it to a bundle: capture, quantise, attach, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexport.bundle import Bundle, BundleWriter, Manifest, ModelInfo, WeightRef
from qexport.bundle.calibration import CALIBRATION, calibration_bytes
from qexport.errors import InputError
from qexport.family import Generator
from qexport.numerics.packing import pack, transposed
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import StoredWeight, assign_rules, output_specs, places_of, require_exportable, stored_weights
from qexport.recipe import Recipe, Rule
from qexport.recipe_toml import recipe_text
from qexport.remarks import Remark, summary
from qexport.scheme import ActivationSpec, PerChannel, PerGroup, TensorSpec
from qexport.solution import Activation, Solution
from qexport.totals import layer_row, totals

if TYPE_CHECKING:
    import onnx_ir as ir

COMPUTE_DTYPE = "float32"
WEIGHTS_FILE = "weights.data"
RECIPE_FILE = "recipe.toml"

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def export(
    generator: Generator,
    recipe: Recipe,
    out: Path,
    *,
    solution: Solution | None = None,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> Bundle:
    """Write the bundle of a generator that is loaded; see `qexport.pipeline.quantize`.

    `solution` is what calibration found; its smoothing factors must have been folded into `generator` before.
    `training` is what the manifest records of how the codes of one graph were trained (`qexport.training`); what was
    trained beside the codes is added to it.

    Raises:
        InputError: the recipe does not fit, or names a format that no ONNX graph can hold, or the solution holds
            trained parameters without a record of their training; nothing was written then.
    """
    from qexport.graph import build
    from qexport.graph.capture import capture
    from qexport.graph.step_scales import with_step_scales

    solution = solution or Solution()
    rules = assign_rules(generator, recipe)  # a recipe that does not fit is said before the slow part
    require_exportable(rules)
    _require_solved(rules, solution, output_specs(generator, rules))
    _require_record(solution, training)
    plan, all_tables = with_step_scales(generator, solution.activations)
    with BundleWriter(out, overwrite=overwrite) as writer:
        graphs: dict[str, ir.Model] = {}
        for done, spec in enumerate(generator.graphs):
            progress("capture", done, len(generator.graphs))
            graphs[spec.name] = capture(spec)
            build.normalise(graphs[spec.name])
        flipped = {name: build.transposed_parameters(model) for name, model in graphs.items()}
        convolutions = {name: build.convolution_weights(model) for name, model in graphs.items()}

        rows, floats, specs = [], [], {name: {} for name in graphs}
        refs: dict[str, dict[str, WeightRef]] = {name: {} for name in graphs}
        total = sum(len(spec.parameters()) for spec in generator.graphs)
        for done, weight in enumerate(stored_weights(generator, recipe, solution)):
            progress("quantise", done, total)
            if weight.name not in graphs[weight.graph].graph.initializers:
                continue  # a buffer of the checkpoint that sampling does not need
            flip = weight.name in flipped[weight.graph]
            for ref in _write(writer, weight, flip, weight.name in convolutions[weight.graph]):
                refs[weight.graph][ref.name] = ref
            rows.append(_row(weight, training))
            floats += _trained(weight)
            if isinstance(weight.value, QuantizedTensor):
                specs[weight.graph][weight.name] = weight.value.spec
        tables = {
            name: writer.weights.add(f"table.{name}", array, array.dtype.name, array.shape).table()
            for name, array in all_tables.items()
        }
        writer.weights.close()
        writer.write(RECIPE_FILE, recipe_text(recipe).encode())
        found = calibration_bytes(solution)
        if found:
            writer.write(CALIBRATION, found)

        for done, (name, model) in enumerate(graphs.items()):
            progress("write", done, len(graphs))
            activations, stepped = _activations_of(generator, solution, name)
            build.quantize_activations(model, activations, stepped, _in_graph(generator, solution.outputs, name))
            build.attach(model, refs[name], specs[name], WEIGHTS_FILE, writer.path, activations)
            build.save(model, writer.path / f"{name}.onnx")
        entry = generator.entry
        writer.finish(
            Manifest(
                model=ModelInfo(
                    entry.name, entry.family, entry.image_size, entry.num_classes, entry.licence, entry.source
                ),
                scheme=scheme_name(recipe, training["method"] if training else None),
                recipe=RECIPE_FILE,
                dtype=COMPUTE_DTYPE,
                checkpoints=generator.checkpoint_sha256,
                plan=replace(plan, tables=tables),
                graphs={name: f"{name}.onnx" for name in graphs},
                layers=[row for row in rows if row["layer"]],
                totals=totals(rows),
                training={**training, "floats": floats} if training and floats else training,
                notes=summary([*_zero_weights(rows), *solution.remarks]),
                calibration=recipe.calibration.to_json() if recipe.calibration.images else None,
            )
        )
        progress("write", len(graphs), len(graphs))
    return Bundle.open(out, check="size")


def scheme_name(recipe: Recipe, trained_by: str | None) -> str:
    """What a bundle is called after: the recipe, and how it was trained, where it was."""
    return recipe.name if trained_by is None else f"{recipe.name}-{trained_by}"


def _row(weight: StoredWeight, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row of one parameter; codes that were trained on say by what, after the algorithm that they started from."""
    row = layer_row(weight)
    if training is not None and row["algorithm"] and weight.graph == training["graph"]:
        row["algorithm"] = f"{row['algorithm']}+{training['method']}"
    return row


def _trained(weight: StoredWeight) -> list[dict[str, Any]]:
    """The row of a parameter that was trained in floating point; none of any other."""
    if not weight.trained:
        return []
    assert weight.sqnr_db is not None
    return [{"name": weight.name, "sqnr_db": round(weight.sqnr_db, 3)}]


def _zero_weights(rows: list[dict[str, Any]]) -> list[Remark]:
    return [Remark("zero_weights", row["name"], *row["zero_groups"]) for row in rows if "zero_groups" in row]


def _require_solved(rules: Mapping[str, Rule], solution: Solution, outputs: Mapping[str, ActivationSpec]) -> None:
    """Raise where the solution is not one of this recipe: a defect of the caller."""
    wanted = {layer: rule.activation for layer, rule in rules.items() if rule.activation is not None}
    found = {layer: activation.spec for layer, activation in solution.activations.items()}
    if wanted != found:
        odd = next(layer for layer in {**wanted, **found} if wanted.get(layer) != found.get(layer))
        raise InputError(f"{odd}: its input is {found.get(odd)} in the solution, {wanted.get(odd)} in the recipe")
    made = {layer: output.spec for layer, output in solution.outputs.items()}
    if outputs != made:
        odd = next(layer for layer in {**outputs, **made} if outputs.get(layer) != made.get(layer))
        raise InputError(f"{odd}: its output is {made.get(odd)} in the solution, {outputs.get(odd)} in the recipe")


def _require_record(solution: Solution, training: Mapping[str, Any] | None) -> None:
    """Raise where trained parameters would not be told as such: a defect of the caller."""
    for place in solution.floats:
        if training is None or not place.startswith(f"{training['graph']}/"):
            raise InputError(f"{place}: was trained, which the record of training does not say")


def _activations_of(
    generator: Generator, solution: Solution, graph: str
) -> tuple[dict[str, Activation], tuple[str, ...]]:
    """The activations of one graph by weight, and the weights whose scales come through its port."""
    from qexport.graph.step_scales import per_step_layers

    places, mine = places_of(generator, solution.activations), _in_graph(generator, solution.activations, graph)
    stepped = (places[name][1] for name in per_step_layers(generator, solution.activations))
    return mine, tuple(name for name in stepped if name in mine)


def _in_graph(generator: Generator, activations: Mapping[str, Activation], graph: str) -> dict[str, Activation]:
    """Those of one graph, by weight."""
    places = places_of(generator, activations)
    return {places[name][1]: value for name, value in activations.items() if places[name][0] == graph}


def _write(writer: BundleWriter, weight: StoredWeight, flip: bool, convolution: bool) -> Iterator[WeightRef]:
    """Append one parameter to the weight file, as the graph wants it."""
    value = weight.value
    if not isinstance(value, QuantizedTensor):
        array = transposed(value) if flip else value
        yield writer.weights.add(weight.name, array, array.dtype.name, array.shape)
        return
    if not flip and not convolution:
        raise InputError(
            f"{weight.layer}: the graph uses this weight neither as a linear layer nor as a convolution; keep it in "
            "floating point"
        )
    codes = transposed(value.codes) if flip else value.codes.reshape(weight.original.shape)
    dtype = (value.spec.format.onnx_type or "").lower()
    yield writer.weights.add(weight.name, pack(codes, value.spec.format.container_bits).tobytes(), dtype, codes.shape)
    yield writer.weights.add(f"{weight.name}_scale", *_scale(value.scales, value.spec))


def _scale(scales: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, str, tuple[int, ...]]:
    """Scales as DequantizeLinear wants them: (K/g, N) for groups, (N,) per channel, () per tensor."""
    if isinstance(spec.granularity, PerGroup):
        array = np.ascontiguousarray(scales.T)
    elif isinstance(spec.granularity, PerChannel):
        array = scales.reshape(-1)
    else:
        array = scales.reshape(())
    return array, "float16", array.shape
