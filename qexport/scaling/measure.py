"""One run: quantise the model in torch, judge it against full precision, sample from it, count what it costs.

The same figures as `benchmarks/ptq_quality.py` by the same code: no bundle is written, and no session options enter.
What the full-precision model says is computed once per model and kept for the next run of it.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qexport.compare import Judge, make_judge
from qexport.compare.judge import PER_IMAGE
from qexport.distill import Distillation, DistillSettings, distill
from qexport.errors import InputError, UnsupportedError
from qexport.family import FeatureExtractor, Generator, find_model
from qexport.methods import parse_method
from qexport.recipe import Recipe
from qexport.recipe_toml import recipe_text
from qexport.reference import torch_player
from qexport.reference.device import device_name, device_of, placed, to_device
from qexport.reference.twin import quantised_twin
from qexport.request import Request
from qexport.scaling.cost import cost_of, count_macs
from qexport.scaling.figures import FD, Arrays, summarise
from qexport.scaling.grid import FULL, START, Measurement, Run, describe
from qexport.scaling.repeat import CHECKPOINT_FILE
from qexport.scaling.store import Measured
from qexport.solution import Solution
from qexport.solve import solve
from qexport.totals import layer_row
from qexport.verify.denoise_quality import Trajectories, play_trajectories
from qexport.verify.fd import measure_fd
from qexport.verify.images import open_images
from qexport.verify.trajectory import label_inputs, labels_for

BATCH = {"cpu": 50, "cuda": 250}
"""Images that are sampled at once; noise belongs to the image, so the figures do not depend on it."""

_TOKEN_FIGURES = ("kl", "top1_agreement")
_TOKEN_FIGURES_ON_IMAGES = ("cross_entropy", "cross_entropy_fp")
_LATENT_FIGURES = ("output_mse", "loss", "loss_fp")


@dataclass(frozen=True)
class Files:
    """Where what a run reads and writes lies, and where it computes; nothing here decides the result.

    `images` are real images, `inception` the weights of FID's network and `reference` the real images or statistics for
    it, whose digests are in the `Measurement`; `checkpoints` maps a model to its file; `work` holds
    the state of fine-tuning, so that a run that was cut off goes on. `device` is ``cpu`` or ``cuda``, where models are
    judged, sampled from and trained; figures differ in their last digits, and a row of ``cuda`` says so.
    """

    images: str | None = None
    checkpoints: tuple[tuple[str, str], ...] = ()
    work: str | None = None
    inception: str | None = None
    reference: tuple[str, ...] = ()
    device: str = "cpu"

    def checkpoint(self, model: str) -> str | None:
        """The file given for a model."""
        return dict(self.checkpoints).get(model)


def load(model: str, files: Files) -> Generator:
    """The full-precision model.

    Raises:
        InputError: the name or the file is wrong.
    """
    family, entry = find_model(model)
    return family.load(entry, files.checkpoint(model), None)


class Bench:
    """One model, and what the full-precision model says on everything that its versions are judged by."""

    def __init__(self, model: str, how: Measurement, files: Files) -> None:
        """Load the model; see `load`."""
        self.plain = load(model, files)
        self.full = placed(self.plain, files.device)
        self.how, self.files = how, files

    @cached_property
    def judge(self) -> Judge:
        """See `qexport.compare.judge`."""
        images, seed = self.files.images, self.how.seed
        if images is None:
            return make_judge(self.full, samples=self.how.drawn, seed=seed, per_image=True)
        entry = self.plain.entry
        wanted = self.how.judged_tokens if self.plain.draw is not None else self.how.judged_latents
        there = len(open_images(images, size=entry.image_size, num_classes=entry.num_classes))
        return make_judge(self.full, images=images, every=max(1, there // wanted), seed=seed, per_image=True)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """What FD is measured in: Inception where its weights were given, else the model's own features.

        Raises:
            UnsupportedError: there is neither.
        """
        if self.files.inception is not None:
            from qexport.verify.inception_run import open_extractor

            side = self.plain.entry.image_size
            return open_extractor(Path(self.files.inception), [Path(p) for p in self.files.reference], (side, side))
        if self.plain.features is None:
            name = self.plain.entry.name
            raise UnsupportedError(f"{name} brings no features to measure FD in; pass --fd 0, or --inception")
        return self.plain.features

    @cached_property
    def macs(self) -> dict[str, int]:
        """See `count_macs`."""
        return count_macs(self.plain)

    @cached_property
    def trajectories(self) -> Trajectories:
        """Of the full-precision denoiser."""
        return self.play(self.full)

    def play(self, generator: Generator) -> Trajectories:
        """What a denoiser samples."""
        assert generator.denoise is not None
        labels = labels_for(self.how.trajectories, generator.entry.num_classes)
        return play_trajectories(torch_player(generator), generator.denoise, labels, seed=self.how.seed)

    def solve(self, run: Run, work: Path | None) -> tuple[Recipe, Solution, dict[str, Any]]:
        """The recipe, the codes, and what was decided on the way."""
        if run.number_format == FULL:
            return Recipe(FULL, ()), Solution(), {}
        method = parse_method(START if run.trained else run.method)
        recipe = Request(run.scheme, method, seed=self.how.seed).recipe(self.plain)
        folded = copy.deepcopy(self.plain)
        solution = solve(folded, recipe)
        settings: dict[str, Any] = {"calibration": recipe.calibration.to_json()}
        if run.trained:
            trained = distill(folded, recipe, solution, self._training(), work=work, device=self.files.device)
            solution = trained.solution
            kept = ("loss", "settings", "rates", "data", "steps", "figure", "start", "best", "best_step", "wall_s")
            settings["training"] = {"start_method": START} | {name: trained.report[name] for name in kept}
        return recipe, solution, settings

    def _training(self) -> DistillSettings:
        """Rates follow from the error whatever the defaults are: keys do not say."""
        steps = self.how.topkld_steps
        return DistillSettings(
            Distillation(), steps=steps, samples=self.how.topkld_samples, seed=self.how.seed,
            evaluate_every=max(1, steps // 8), batch=self.how.topkld_batch, lr=None, scale_lr=None, rest_lr=None,
        )  # fmt: skip

    def run(self, run: Run, work: Path | None) -> Measured:
        """Everything about one version of the model."""
        recipe, solution, settings = self.solve(run, work)
        rows: list[dict[str, Any]] = []
        twin = quantised_twin(self.plain, recipe, solution, lambda weight: rows.append(layer_row(weight))).quantised
        to_device(twin, self.files.device)
        found = dict(self.judge(twin, False))
        arrays: dict[str, np.ndarray] = dict(found.pop(PER_IMAGE))
        names = _LATENT_FIGURES
        if twin.draw is not None:
            names = (*_TOKEN_FIGURES, *(_TOKEN_FIGURES_ON_IMAGES if self.files.images else ("cross_entropy_drawn",)))
        figures = {name: summarise(name, arrays) for name in names}
        if twin.denoise is not None:
            parts = trajectory_terms(self.trajectories, self.play(twin))
            arrays |= parts
            figures["trajectory_error"] = summarise("trajectory_error", parts)
        if self.how.fd:
            figures[FD] = self.frechet(twin)
        settings |= {"measurement": describe(self.how), "judged_on": found["source"]}
        if self.files.device != "cpu":
            settings["device"] = device_name(self.files.device)
        settings |= {"checkpoints": dict(self.plain.checkpoint_sha256), "recipe": recipe_text(recipe)}
        if (given := self.files.checkpoint(run.model)) is not None:
            settings[CHECKPOINT_FILE] = Path(given).name
        return Measured(figures, cost_of(self.plain, rows, self.macs), arrays, settings)

    def frechet(self, generator: Generator) -> dict[str, Any]:
        """FD of images that a version of the model samples; see `extractor` for what it raises."""
        player, count, seed = torch_player(generator), self.how.fd, self.how.seed
        labels = labels_for(count, generator.entry.num_classes)
        batch = BATCH[device_of(generator).type]
        batches = (
            player.play(label_inputs(generator.plan, labels[i : i + batch]), seed=seed, first_index=i)
            for i in range(0, count, batch)
        )
        return measure_fd(batches, self.extractor, seed, device_of(generator)).to_json()


def trajectory_terms(wanted: Trajectories, found: Trajectories) -> Arrays:
    """``trajectory_error`` and ``trajectory_power`` of each image's final latents, (n,) float64 sums of squares."""
    reference = wanted.states[-1].astype(np.float64)
    difference = found.states[-1] - reference
    return {
        "trajectory_error": (difference**2).reshape(len(reference), -1).sum(axis=1),
        "trajectory_power": (reference**2).reshape(len(reference), -1).sum(axis=1),
    }


_last: tuple[tuple[str, Measurement, Files], Bench] | None = None


def measure(run: Run, key: str, how: Measurement, files: Files) -> Measured:
    """Measure one run; keeps the model for the next one.

    Raises:
        InputError: the run does not fit the model.
    """
    global _last
    asked = (run.model, how, files)
    if _last is None or _last[0] != asked:
        _last = None  # two models need not be in memory
        _last = asked, Bench(run.model, how, files)
    work = Path(files.work) / key[:16] if files.work and run.trained else None
    measured = _last[1].run(run, work)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    if not all(np.isfinite(figure["value"]) for figure in measured.figures.values()):
        raise InputError(f"{run}: a figure is not finite")
    return measured
