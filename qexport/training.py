"""Fine-tuning as a stage of the pipeline: what is refused before it starts, its data, and what is recorded about it.

The manifest gets what decides the result (`Trained.record`), for it holds no measured value; losses, judgements,
seconds and memory go to the bundle's reports (`training.json`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qexport.distill import TOPK_LOSSES, Distilled, DistillSettings, Samples, distill, from_first, image_tokens
from qexport.distill.least import least_bytes
from qexport.distill.memory import require_memory
from qexport.distill.processes import launched, own_device, require_shares, sharing
from qexport.distill.run import make_task, require_device
from qexport.distill.student import trained_graph
from qexport.errors import InputError
from qexport.family import Generator
from qexport.quantize import assign_rules, places_of
from qexport.recipe import Recipe
from qexport.solution import Solution
from qexport.verify.images import ImageSet, open_images

TOPKLD = "topkld"
CONTROL = "output-mse"
"""The loss of denoisers."""

STAGE = "train"
TOKEN_BATCH = 25
LEAST_HELD_OUT, MOST_HELD_OUT_SHARE = 1, 5
"""Of few images no more than every fifth is held out."""

Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Training:
    """What is asked of fine-tuning.

    Args:
        settings: see `DistillSettings`.
        data: images to learn on (`qexport.verify.images`), made tokens by the model's own encoder; None: the
            full-precision model's own samples.
        loss_option: how the loss was asked for, for messages; empty where nobody did. A denoiser has no choice of loss
            and refuses.
        device: where it trains, ``cpu`` or ``cuda``.
    """

    settings: DistillSettings = field(default_factory=DistillSettings)
    data: Path | None = None
    loss_option: str = ""
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Trained:
    """The trained solution, what the manifest records of it, and what was measured."""

    solution: Solution
    record: dict[str, Any]
    report: dict[str, Any]

    def report_bytes(self) -> bytes:
        """The file for the bundle's reports: record and figures."""
        return (json.dumps({**self.record, **self.report}, indent=1) + "\n").encode()


def method_of(generator: Generator, training: Training) -> str:
    """What the bundle's name says: ``topkld`` for its three variants, otherwise the name of the loss."""
    if generator.denoise is not None and generator.quality is None:
        return CONTROL
    loss = training.settings.loss.loss
    return TOPKLD if loss in TOPK_LOSSES else loss


def prepare(generator: Generator, training: Training) -> ImageSet | None:
    """Refuse what cannot be trained, before anything slow; the images to learn on, where there are any.

    Of the images, those that will be learned on are looked at (`ImageSet.check`), not decoded.

    Raises:
        InputError: the model cannot be trained, there is no such device or too little memory, the images cannot be
            used, or the options do not fit the model.
    """
    trained_graph(generator)
    name, settings = generator.entry.name, training.settings
    require_device(training.device, "--device", settings)
    require_shares(settings.batch)
    if method_of(generator, training) == CONTROL:
        if training.loss_option:
            raise InputError(
                f"{training.loss_option} is about distributions of tokens; {name} draws none and is trained on the "
                f"squared error of its output; leave {training.loss_option} out"
            )
        if training.data is not None:
            raise InputError(
                f"--data {training.data}: {name} draws no tokens; it is trained on latents that the full-precision "
                "model samples; leave --data out"
            )
    elif settings.per_trajectory != DistillSettings().per_trajectory:
        raise InputError(f"per_trajectory is about denoisers; {name} draws tokens; leave it out")
    make_task(generator, settings)  # says which weights of scales do not fit
    _require_room(generator, training, 0)
    if training.data is None:
        return None
    entry = generator.entry
    images = open_images(training.data, size=entry.image_size, num_classes=entry.num_classes)
    if len(images) < 2:
        raise InputError(f"{training.data}: holds {len(images)} image; at least 2 are needed, one to judge by")
    for i in _chosen(images, _held_out_of(images, settings)):
        images.check(int(i))
    return images


def require_trainable(generator: Generator, recipe: Recipe, training: Training | None = None) -> None:
    """Refuse a recipe without anything to train, or with more than the memory holds.

    Raises:
        InputError: it quantises no matrix of the graph that is trained, or `training` would take too much memory.
    """
    graph = trained_graph(generator)
    places = places_of(generator, assign_rules(generator, recipe)).values()
    names = [name for place, name in places if place == graph]
    if not names:
        raise InputError(
            f"recipe {recipe.name!r} quantises no matrix of graph {graph!r} of {generator.entry.name}: nothing to train"
        )
    if training is not None:
        parameters = generator.graph(graph).parameters()
        _require_room(generator, training, sum(parameters[name].numel() for name in names))


def _require_room(generator: Generator, training: Training, trained: int) -> None:
    """Refuse what cannot fit, as far as shapes tell; the trained student is measured later."""
    needed = least_bytes(generator, training.settings, launched(), trained, training.device)
    place = str(own_device(training.device))
    require_memory(needed, training.settings, sharing(training.device), place, least=True)


def fine_tune(
    generator: Generator,
    recipe: Recipe,
    solution: Solution,
    training: Training,
    *,
    images: ImageSet | None = None,
    work: Path | None = None,
    progress: Progress,
    note: Note,
) -> Trained:
    """Train what post-training quantisation found; `generator` has its smoothing folded in.

    `images` are what `prepare` opened. `progress` is told the stage ``train``, with loss and figure after a colon.

    Raises:
        InputError: see `qexport.distill.distill`.
    """
    settings, method = training.settings, method_of(generator, training)
    figure = "output error" if method == CONTROL else "KL"
    if method == CONTROL:
        note(
            f"{generator.entry.name} draws no tokens, so there is no TopKLD for it: it is trained on the squared error "
            "of its output, the control"
        )
    if settings.sharded and launched() == 1:
        note("sharded: a single process has nothing to divide; torchrun starts several")
    data = None
    if images is not None:
        settings = _held_out_of(images, settings)
        data = from_first(lambda: _tokens(generator, images, settings, progress))

    def step(done: int, total: int, loss: float, held: float) -> None:
        progress(f"{STAGE}: loss {loss:.4f}, held-out {figure} {held:.4f}", done, total)

    found = distill(
        generator,
        recipe,
        solution,
        settings,
        data=data,
        work=work,
        progress=step,
        drawing=lambda done, total: progress("draw", done, total),
        resumed=lambda done: note(f"going on after step {done} of {settings.steps} ({work})"),
        device=training.device,
    )
    return Trained(found.solution, _record(generator, recipe, settings, method, found), found.report)


def _held_out_of(images: ImageSet, settings: DistillSettings) -> DistillSettings:
    """The settings with as many held out as so few images allow."""
    held_out = max(LEAST_HELD_OUT, min(settings.held_out, len(images) // MOST_HELD_OUT_SHARE))
    return replace(settings, held_out=held_out)


def _chosen(images: ImageSet, settings: DistillSettings) -> np.ndarray:
    """Numbers of as many images as training looks at, drawn without repetition under its seed."""
    count = min(len(images), settings.steps * settings.batch + settings.held_out)
    return np.random.default_rng(settings.seed).permutation(len(images))[:count]


def _tokens(generator: Generator, images: ImageSet, settings: DistillSettings, progress: Progress) -> Samples:
    """Tokens of the images that training looks at."""
    order = _chosen(images, settings)
    count = len(order)
    chosen = ImageSet(lambda i: images.load(int(order[i])), images.labels[order], images.source)
    source = images.source if count == len(images) else f"{count} of {images.source}, seed {settings.seed}"

    def told() -> Any:
        done = 0
        for pixels, labels in chosen.batches(TOKEN_BATCH):
            progress("tokens", done, count)
            yield pixels, labels
            done += len(labels)
        progress("tokens", count, count)

    return image_tokens(generator, told(), source)


def _record(
    generator: Generator, recipe: Recipe, settings: DistillSettings, method: str, found: Distilled
) -> dict[str, Any]:
    """For the manifest: what decides the result, nothing that was measured."""
    graph = trained_graph(generator)
    rules = assign_rules(generator, recipe)
    places = places_of(generator, rules)
    starts = {
        "+".join(part for part in (rule.smooth, rule.algorithm) if part)
        for layer, rule in rules.items()
        if places[layer][0] == graph
    }
    given = settings.to_json()
    loss: Mapping[str, Any] = given.pop("loss")
    record = {"method": method, "loss": found.report["loss"], "start_from": ", ".join(sorted(starts)), "graph": graph}
    if method == TOPKLD:
        record["top_k"] = loss["top_k"]
    if record["loss"] == "boosted":
        record["boost"] = loss["boost"]
    if found.report["figure"] != "output_mse":
        del given["per_trajectory"]  # of denoisers
    return record | {"data": found.report["data"], "settings": given}
