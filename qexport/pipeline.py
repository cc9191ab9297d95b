"""The only place that orders stages: load, quantise, capture, attach, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qexport.bundle import Bundle, BundleWriter, Manifest, ModelInfo, WeightRef
from qexport.checkpoint import open_checkpoint
from qexport.errors import InputError
from qexport.family import Generator, ModelEntry, find_model, load_random, recognise
from qexport.numerics.packing import pack, transposed
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import StoredWeight, assign_rules, stored_weights
from qexport.recipe import Recipe, recipe_for
from qexport.scheme import Scheme, TensorSpec, preset
from qexport.totals import layer_row, totals

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_FOLDER = Path("qexport-out")
COMPUTE_DTYPE = "float32"
WEIGHTS_FILE = "weights.data"
RECIPE_FILE = "recipe.toml"

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def quantize(
    model: str | None = None,
    *,
    scheme: Scheme | None = None,
    recipe: Recipe | None = None,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    random_weights: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    loaded: Callable[[ModelEntry], None] | None = None,
) -> Bundle:
    """Quantise a model and write its bundle.

    Args:
        model: a name that `qexport models` lists; may be left out where `checkpoint` tells.
        scheme: how to quantise; the default is int4 weights in groups of 32. Not together with `recipe`.
        recipe: layer by layer instead.
        checkpoint: file (or folder) of the generator's weights, where it is not bundled.
        vae_checkpoint: file of the decoder's weights.
        random_weights: a seed; fills a model of that shape with random numbers instead, for engineering only.
        out: folder of the bundle; by default ``./qexport-out/<model>-<scheme>``.
        overwrite: replace a bundle that is there.
        progress: told how far it is.
        loaded: told which model it is, once its weights are read and before the long part.

    Returns:
        The bundle, opened.

    Raises:
        InputError: an unknown model, a recipe that does not fit, a destination that cannot be written.
        CheckpointError: a checkpoint that is missing or does not fit.
    """
    if scheme is not None and recipe is not None:
        raise InputError("give a scheme or a recipe, not both")
    tell = progress or (lambda stage, done, total: None)
    tell("load", 0, 1)
    generator = load_generator(model, checkpoint, vae_checkpoint, random_weights)
    if loaded is not None:
        loaded(generator.entry)
    if recipe is None:
        scheme = scheme or preset()
        recipe = recipe_for(scheme, generator.default_layers, scheme.name)
    folder = Path(out) if out is not None else DEFAULT_FOLDER / f"{generator.entry.name}-{recipe.name}"
    return export(generator, recipe, folder, overwrite=overwrite, progress=tell)


def load_generator(
    model: str | None,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    random_weights: int | None = None,
) -> Generator:
    """The model that these options mean; see `quantize`.

    Raises:
        InputError: nothing says which model, or the options contradict each other.
        CheckpointError: a checkpoint that is missing or does not fit.
    """
    if random_weights is not None:
        if model is None or checkpoint is not None or vae_checkpoint is not None:
            raise InputError("--random-weights needs --model and no checkpoint: it stands for the file")
        return load_random(model, random_weights)
    if model is None:
        if checkpoint is None:
            raise InputError("say which model: --model NAME (`qexport models` lists them) or --checkpoint FILE")
        opened = open_checkpoint(checkpoint)
        model = recognise(opened.shapes, opened.config, opened.path.name).name
    family, entry = find_model(model)
    return family.load(entry, checkpoint, vae_checkpoint)


def export(generator: Generator, recipe: Recipe, out: Path, *, overwrite: bool = False, progress: Progress) -> Bundle:
    """Write the bundle of a generator that is loaded; see `quantize`."""
    from qexport.graph import build
    from qexport.graph.capture import capture

    assign_rules(generator, recipe)  # a recipe that does not fit is said before the slow part
    with BundleWriter(out, overwrite=overwrite) as writer:
        graphs: dict[str, ir.Model] = {}
        for done, spec in enumerate(generator.graphs):
            progress("capture", done, len(generator.graphs))
            graphs[spec.name] = capture(spec)
            build.normalise(graphs[spec.name])
        flipped = {name: build.transposed_parameters(model) for name, model in graphs.items()}

        rows, specs = [], {name: {} for name in graphs}
        refs: dict[str, dict[str, WeightRef]] = {name: {} for name in graphs}
        total = sum(len(spec.parameters()) for spec in generator.graphs)
        for done, weight in enumerate(stored_weights(generator, recipe)):
            progress("quantise", done, total)
            if weight.name not in graphs[weight.graph].graph.initializers:
                continue  # a buffer of the checkpoint that sampling does not need
            flip = weight.name in flipped[weight.graph]
            for ref in _write(writer, weight, flip):
                refs[weight.graph][ref.name] = ref
            rows.append(layer_row(weight))
            if isinstance(weight.value, QuantizedTensor):
                specs[weight.graph][weight.name] = weight.value.spec
        tables = {
            name: writer.weights.add(f"table.{name}", array, array.dtype.name, array.shape).table()
            for name, array in generator.tables.items()
        }
        writer.weights.close()
        writer.write(RECIPE_FILE, recipe.to_toml().encode())

        for done, (name, model) in enumerate(graphs.items()):
            progress("write", done, len(graphs))
            build.attach(model, refs[name], specs[name], WEIGHTS_FILE, writer.path)
            build.save(model, writer.path / f"{name}.onnx")
        entry = generator.entry
        writer.finish(
            Manifest(
                model=ModelInfo(
                    entry.name, entry.family, entry.image_size, entry.num_classes, entry.licence, entry.source
                ),
                scheme=recipe.name,
                recipe=RECIPE_FILE,
                dtype=COMPUTE_DTYPE,
                checkpoints=generator.checkpoint_sha256,
                plan=replace(generator.plan, tables=tables),
                graphs={name: f"{name}.onnx" for name in graphs},
                layers=[row for row in rows if row["layer"]],
                totals=totals(rows),
            )
        )
        progress("write", len(graphs), len(graphs))
    return Bundle.open(out, check="size")


def _write(writer: BundleWriter, weight: StoredWeight, flip: bool) -> Iterator[WeightRef]:
    """Append one parameter to the weight file, as the graph wants it."""
    value = weight.value
    if not isinstance(value, QuantizedTensor):
        array = transposed(value) if flip else value
        yield writer.weights.add(weight.name, array, array.dtype.name, array.shape)
        return
    if not flip:
        raise InputError(
            f"{weight.layer}: the graph does not use this weight as a linear layer; it cannot be quantised"
        )
    codes = transposed(value.codes)
    dtype = (value.spec.format.onnx_type or "").lower()
    yield writer.weights.add(weight.name, pack(codes, value.spec.format.container_bits).tobytes(), dtype, codes.shape)
    yield writer.weights.add(f"{weight.name}_scale", *_scale(value.scales, value.spec))


def _scale(scales: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, str, tuple[int, ...]]:
    """Scales as DequantizeLinear wants them: (K/g, N) for groups, (N,) per channel, () per tensor."""
    from qexport.scheme import PerChannel, PerGroup

    if isinstance(spec.granularity, PerGroup):
        array = np.ascontiguousarray(scales.T)
    elif isinstance(spec.granularity, PerChannel):
        array = scales.reshape(-1)
    else:
        array = scales.reshape(())
    return array, "float16", array.shape
