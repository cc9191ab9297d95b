"""The only place that orders stages: load, decide, solve, export."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qexport.bundle import Bundle
from qexport.bundle.reports import TRAINING_REPORT
from qexport.checkpoint import open_checkpoint
from qexport.decide import Decision, decide
from qexport.errors import InputError
from qexport.export import export, scheme_name
from qexport.family import Generator, ModelEntry, find_model, load_random, recognise
from qexport.quantize import assign_rules, require_exportable, why_not_exportable
from qexport.recipe import Recipe
from qexport.request import DEFAULT_METHOD, TRAINED_FROM, Request
from qexport.scheme import Scheme, preset

if TYPE_CHECKING:
    from qexport.training import Training

DEFAULT_FOLDER = Path("qexport-out")

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def quantize(
    model: str | None = None,
    *,
    scheme: Scheme | None = None,
    request: Request | None = None,
    recipe: Recipe | None = None,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    random_weights: int | None = None,
    calibration_data: str | Path | None = None,
    training: Training | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    loaded: Callable[[ModelEntry], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Bundle:
    """Quantise a model and write its bundle.

    Args:
        model: a name that `qexport models` lists; may be left out where `checkpoint` tells.
        scheme: how to quantise, rounding to nearest; the default is int4 weights in groups of 32.
        request: all that can be asked for instead: scheme, method, calibration, decoder, mixed precision.
        recipe: layer by layer instead.
        checkpoint: file (or folder) of the generator's weights, where it is not bundled.
        vae_checkpoint: file of the decoder's weights.
        random_weights: a seed; fills a model of that shape with random numbers instead, for engineering only.
        calibration_data: images to calibrate on, in place of the model's own samples (`qexport.calibration_data`).
        training: fine-tune what quantisation made, before it is written. A run that is cut off leaves a folder beside
            the bundle, ``.<name>.training``, and the same call goes on from there.
        out: folder of the bundle; by default ``./qexport-out/<model>-<scheme>``.
        overwrite: replace a bundle that is there.
        progress: told how far it is; a stage has one name up to a colon, what follows changes.
        loaded: told which model it is, once its weights are read and before the long part.
        note: told, in a line each, what one should know meanwhile.

    Returns:
        The bundle, opened.

    Raises:
        InputError: an unknown model, a recipe that does not fit, a destination that cannot be written.
        CheckpointError: a checkpoint that is missing or does not fit.
    """
    if sum(given is not None for given in (scheme, request, recipe)) > 1:
        raise InputError("give one of scheme, request and recipe")
    if recipe is None:
        _require_sound(request or Request(scheme or preset()))  # before anything is loaded, let alone compared
    tell = progress or (lambda stage, done, total: None)
    tell("load", 0, 1)
    generator = load_generator(model, checkpoint, vae_checkpoint, random_weights)
    if loaded is not None:
        loaded(generator.entry)
    images = trained_by = None
    if training is not None:
        from qexport.training import method_of, prepare

        images = prepare(generator, training)  # what does not fit is said before the slow part
        trained_by = method_of(generator, training)
    asked = request or Request(scheme or preset(), TRAINED_FROM if training else DEFAULT_METHOD)
    if calibration_data is not None or recipe is not None:
        from qexport.calibration_data import of_recipe, on_images

        given = None if calibration_data is None else Path(calibration_data)
        if recipe is not None:
            recipe = of_recipe(generator, recipe, given)
        elif given is not None:
            asked = on_images(generator, asked, given)
    from qexport.solve import solve

    if training is None:
        decision = Decision(recipe) if recipe else decide(generator, asked, tell)
        folder = _folder(out, generator, decision.recipe)
        with _work(folder, "calibration", _calibrates(generator, decision.recipe)) as work:
            solution = solve(generator, decision.recipe, work=work, progress=tell)
            bundle = export(generator, decision.recipe, folder, solution=solution, overwrite=overwrite, progress=tell)
        return _told(_with_reports(bundle, decision.reports), note)

    from qexport.distill import from_first, is_first, process_group, wait
    from qexport.reference import apply_folds
    from qexport.training import fine_tune, require_trainable

    with process_group(training.device):  # of several, the first calibrates for all
        decision = Decision(recipe) if recipe else from_first(lambda: decide(generator, asked, tell))
        recipe = decision.recipe
        folder = _folder(out, generator, recipe, trained_by)
        calibrates = _calibrates(generator, recipe)
        require_trainable(generator, recipe, training)
        _require_free(folder, overwrite)
        with (
            _work(folder, "calibration", calibrates and is_first()) as work,
            _work(folder, "training", True) as checkpoints,
        ):
            solution = from_first(lambda: solve(generator, recipe, work=work, progress=tell))
            if not is_first():
                apply_folds(generator, solution.smooth)
            trained = fine_tune(
                generator, recipe, solution, training, images=images, work=checkpoints, progress=tell,
                note=note or (lambda line: None),
            )  # fmt: skip
            if is_first():
                bundle = export(
                    generator, recipe, folder, solution=trained.solution, training=trained.record, overwrite=overwrite,
                    progress=tell,
                )  # fmt: skip
                _told(_with_reports(bundle, {**decision.reports, TRAINING_REPORT: trained.report_bytes()}), note)
            wait()
    return Bundle.open(folder, check="size")


def _folder(out: str | Path | None, generator: Generator, recipe: Recipe, trained_by: str | None = None) -> Path:
    """Where the bundle goes."""
    name = f"{generator.entry.name}-{scheme_name(recipe, trained_by)}"
    return Path(out) if out is not None else DEFAULT_FOLDER / name


def _calibrates(generator: Generator, recipe: Recipe) -> bool:
    """Whether the recipe, which must be one that can be exported, needs to see inputs."""
    from qexport.solve import needs_calibration

    rules = assign_rules(generator, recipe)
    require_exportable(rules)
    return needs_calibration(rules.values())


def _require_sound(request: Request) -> None:
    """Refuse what no bundle can hold; with a budget, formats are chosen later."""
    weight = request.scheme.weight if request.budget is None else None
    if reason := why_not_exportable(weight, request.scheme.activation):
        raise InputError(reason)


def _require_free(folder: Path, overwrite: bool) -> None:
    """Say what `BundleWriter` would, before training and not after it."""
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists; choose another --out, or pass --overwrite")


@contextmanager
def _work(folder: Path, purpose: str, wanted: bool) -> Iterator[Path | None]:
    """A hidden folder beside the bundle, for what an interrupted run goes on from; gone once the block is through."""
    path = folder.with_name(f".{folder.name}.{purpose}") if wanted else None
    yield path
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


def _with_reports(bundle: Bundle, reports: Mapping[str, bytes]) -> Bundle:
    if reports:
        bundle.reports.mkdir(exist_ok=True)
        for name, data in reports.items():
            (bundle.reports / name).write_bytes(data)
    return bundle


def _told(bundle: Bundle, note: Callable[[str], None] | None) -> Bundle:
    """The bundle, after the notes of its manifest were handed on."""
    tell = note or (lambda line: None)
    for found in bundle.manifest.notes:
        tell(f"note: {found['text']}")
    return bundle


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
