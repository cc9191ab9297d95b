"""Fine-tuning as one call: samples, student, training, and a solution that is exported like any other."""

from __future__ import annotations

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qexport.distill import processes
from qexport.distill.checkpoints import Checkpoints, key_of
from qexport.distill.data import Samples, drawn_latents, drawn_tokens, with_null_labels
from qexport.distill.memory import estimate_bytes, require_memory
from qexport.distill.rates import REST_SHARE
from qexport.distill.recompute import computing
from qexport.distill.settings import DistillSettings
from qexport.distill.student import Student, trained_graph
from qexport.distill.tasks import DenoiseTask, Task, TokenTask
from qexport.distill.trainer import Progress, Trainer
from qexport.errors import InputError
from qexport.family import Generator
from qexport.quantize import as_stored
from qexport.recipe import Recipe
from qexport.recipe_toml import recipe_text
from qexport.reference.device import choose_device, device_name, placed
from qexport.solution import Solution

DATA_FILE = "data.pt"
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
_TOKEN_LABELS, _LATENT_LABELS = 0, 2  # which tensor of the samples holds the labels


@dataclass(frozen=True, eq=False)
class Distilled:
    """The solution with trained weights (and activation scales), and what the manifest says about it."""

    solution: Solution
    report: dict[str, Any]


def distill(
    generator: Generator,
    recipe: Recipe,
    solution: Solution,
    settings: DistillSettings | None = None,
    *,
    data: Samples | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
    drawing: Callable[[int, int], None] | None = None,
    resumed: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> Distilled:
    """Train the quantised model to do what the full-precision one does.

    Args:
        generator: full precision, with the smoothing of `solution` folded in; it is the teacher, and not changed.
        recipe: what is quantised to what.
        solution: where training starts; what it lacks, the recipe's algorithms make.
        settings: see `DistillSettings`.
        data: tokens of images (`image_tokens`), or other samples; None lets the teacher draw them.
        work: a folder for checkpoints; the same call then goes on where it was cut off, to the same result.
        progress: told after every step.
        drawing: told how many samples are drawn.
        resumed: told after how many steps it goes on, where it does.
        device: where teacher and student compute, ``cpu`` or ``cuda``; of several processes each has a GPU to itself.
            Batches are the same ones; numbers differ in their last bits, so a run goes on only from a checkpoint of
            its own kind of device.

    Returns:
        `solution` with the weights of the trained graph replaced, activation scales where they were learned, and other
        parameters where these were (`DistillSettings.rest_lr`); never worse on the held-out samples than where it
        started.

    Raises:
        InputError: the model cannot be trained, there is no such device, there is too little memory, or training
            diverged.
    """
    settings = settings or DistillSettings()
    start_s = time.perf_counter()
    trained_graph(generator)  # says first whether the model can be trained at all
    require_device(device, settings=settings)
    with processes.process_group(device):
        place = processes.own_device(device)
        generator, teacher = placed(generator, "cpu"), placed(generator, place)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        task = make_task(generator, settings)
        checkpoints = None
        if work is not None:
            key = key_of(
                version("qexport"), settings.to_json(), dict(generator.checkpoint_sha256), generator.entry.name,
                recipe_text(recipe), _digest(solution), [] if data is None else _digest_samples(data),
                *([] if device == "cpu" else [device]),
                *([task.error_share, REST_SHARE] if None in (settings.lr, settings.scale_lr, settings.rest_lr) else []),
            )  # fmt: skip
            checkpoints = Checkpoints(work, key)
        samples = data or _drawn(teacher, settings, checkpoints, drawing)
        column = _TOKEN_LABELS if generator.denoise is None else _LATENT_LABELS
        trained_on, held = samples.split(settings.held_out)
        if settings.unconditional and _knows_null(generator, task, held):
            null = generator.entry.num_classes
            trained_on = with_null_labels(trained_on, column, null, settings.unconditional, settings.seed)
        student = Student(
            teacher, recipe, solution, task.predictor, task.place_steps, learn_scales=settings.learn_scales,
            learn_activation_scales=settings.learn_scales,
        )  # fmt: skip
        one = next(held.batches(1))
        if settings.train_rest:
            with computing(student, settings):
                student.train_rest(*(tensor.to(place) for tensor in one))
        needed = estimate_bytes(student, one, settings, processes.world(), len(held))
        require_memory(needed, settings, processes.sharing(device), str(place))
        trainer = Trainer(student, task.predictor(teacher), task, (trained_on, held), settings, checkpoints)
        trained = trainer.run(progress, resumed)
    best = trained.best
    found = replace(
        solution,
        weights={**solution.weights, **best.weights},
        activations={**solution.activations, **best.activations},
        floats=_changed(generator, {**solution.floats, **best.floats}),
    )
    history = trained.history
    report = {
        "loss": settings.loss.loss if generator.denoise is None else "output-mse",
        "settings": settings.to_json(),
        "rates": trainer.rates.to_json(),
        "data": samples.source,
        "steps": len(history.losses),
        "figure": task.figure,
        "start": history.judged[0][1],
        "best": history.best[1],
        "best_step": history.best[0],
        "judged": [list(entry) for entry in history.judged],
        "losses": history.losses,
        "resumed_after": trainer.resumed_after,
        "wall_s": round(time.perf_counter() - start_s, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        "processes": processes.launched(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        report |= {"device": device_name(place), "peak_device_bytes": torch.cuda.max_memory_allocated(place)}
    return Distilled(found, report)


def require_device(device: str, option: str = "device", settings: DistillSettings | None = None) -> None:
    """Nothing, if training can be done there.

    Raises:
        InputError: it is unknown or not there, there are fewer GPUs than processes, or the settings are about a CPU.
    """
    if choose_device(device, option) != device:
        raise InputError(f"{option} {device!r} is not one device; use cpu or cuda")
    if device == "cpu":
        return
    processes.require_gpus(option)
    if settings is not None and settings.offload:
        raise InputError(
            f"{option} cuda: offload keeps moments in a file that is mapped into the CPU's memory; leave it out, or "
            "let several processes divide them (sharded)"
        )


def make_task(generator: Generator, settings: DistillSettings) -> Task:
    """What the model is taught.

    Raises:
        InputError: weights of scales that do not fit the model.
    """
    if generator.denoise is None:
        return TokenTask(generator, settings.loss, settings.scale_weights)
    if settings.scale_weights is not None:
        raise InputError(f"{generator.entry.name} has no scales to weigh; leave scale_weights out")
    return DenoiseTask(generator)


def _drawn(
    generator: Generator,
    settings: DistillSettings,
    checkpoints: Checkpoints | None,
    drawing: Callable[[int, int], None] | None,
) -> Samples:
    """The teacher's samples: the first process draws them, and the others read them where there is a folder."""
    if checkpoints is None:
        return processes.from_first(lambda: _draw(generator, settings, drawing))
    if processes.is_first() and checkpoints.load(DATA_FILE) is None:
        samples = _draw(generator, settings, drawing)
        checkpoints.save(DATA_FILE, {"tensors": list(samples.tensors), "source": samples.source})
    processes.wait()
    state = checkpoints.load(DATA_FILE)
    if state is None:
        raise InputError(f"{checkpoints.folder / DATA_FILE}: is not there; all processes must see the same folder")
    return Samples(tuple(state["tensors"]), state["source"])


def _draw(generator: Generator, settings: DistillSettings, drawing: Callable[[int, int], None] | None) -> Samples:
    if generator.denoise is None:
        return drawn_tokens(generator, settings.samples, settings.seed, drawing)
    return drawn_latents(generator, settings.samples, settings.seed, settings.per_trajectory, drawing)


@torch.no_grad()
def _knows_null(generator: Generator, task: Task, samples: Samples) -> bool:
    """Whether label number `num_classes` means something to the model; a model without guidance has no such row."""
    column = _TOKEN_LABELS if generator.denoise is None else _LATENT_LABELS
    one = next(samples.batches(1))
    asked = tuple(torch.full_like(t, generator.entry.num_classes) if i == column else t for i, t in enumerate(one))
    try:
        task.predictor(generator)(*asked)
    except IndexError:
        return False
    return True


def _changed(generator: Generator, floats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that are not what is stored of the model's own parameters anyway."""
    found = {}
    for place, value in floats.items():
        graph, _, name = place.partition("/")
        own = generator.graph(graph).parameters()[name].detach().cpu().numpy()
        if not np.array_equal(value, as_stored(name, own)):
            found[place] = value
    return found


def _digest(solution: Solution) -> str:
    digest = hashlib.sha256()
    for layer, weight in sorted(solution.weights.items()):
        digest.update(f"{layer} {weight.spec}".encode() + weight.codes.tobytes() + weight.scales.tobytes())
    for name, factor in sorted(solution.smooth.items()):
        digest.update(name.encode() + factor.tobytes())
    for layer, found in sorted(solution.activations.items()):
        scale = b"" if found.scale is None else found.scale.tobytes()
        digest.update(f"{layer} {found.spec} {found.zero_point}".encode() + scale)
    for place, value in sorted(solution.floats.items()):
        digest.update(f"{place} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def _digest_samples(samples: Samples) -> str:
    digest = hashlib.sha256()
    for tensor in samples.tensors:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
