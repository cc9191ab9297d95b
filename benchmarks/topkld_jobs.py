"""Which rows topkld_quality.py makes: a plan of sweeps in order, as single jobs, and how processes share them.

A plan is a JSON list of sweeps, most wanted first. Each is an object of `Sweep`'s fields; what it leaves out is as on
the command line:

    [{"models": ["var-c10-d4"], "schemes": ["W2"], "losses": ["forward"], "steps": 1200, "lr": [0.01, 0.02]},
     {"models": ["var-c10-d2", "var-c10-d3"], "seeds": [0], "fd": 1000}]

Processes that work on one plan share the folder --work: whoever creates the file of a row in its `claims` makes that
row. A process that dies leaves its claims behind, and nobody makes those rows again until `claims` is deleted; rows
that are in a file named by --known or --out are never made again. Rows are taken sweep by sweep, those of the model
that a process has loaded first, so that none is idle while there are rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from qexport.distill import TOPK_LOSSES
from qexport.family import find_model
from qexport.formats import get_format
from qexport.scheme import ActivationSpec, PerGroup, Scheme, Static, TensorSpec, preset

HEAD = 900
"""Tokens of the figures that look at the teacher's most likely ones: what the published sampler draws from."""

NO_LOSS = "none"
LOSSES = ("forward", "split", "mixed", "boosted", "reverse", "js", "logit-mse", "cross-entropy")
BASELINES = ("rtn", "mse")

VARIED: dict[str, Any] = {
    "lr": 0.01, "scale_lr": 0.007, "ema": 0.0, "samples": 1024, "batch": 16, "rest_lr": 0.0,
}  # fmt: skip
"""Settings of training with what they are in a row that does not name them. Rows of before this did not name
``samples`` and ``batch``; what they were is in their ``settings``. They are not qexport's defaults, found after most
rows had been made. A rate of `AUTO` follows from the error of quantisation."""

AUTO = "auto"

RATES = ("lr", "scale_lr", "ema", "rest_lr")
"""Those that a sweep combines."""

KEY = ("model", "scheme", "start", "loss", "top_k", "seed", "steps", "data", *VARIED)


def _ternary(size: int) -> Scheme:
    return Scheme(TensorSpec(get_format("ternary"), PerGroup(size)), None)


def _with_activations(wbits: int, name: str) -> Scheme:
    return Scheme(preset(wbits).weight, ActivationSpec(get_format(name), Static()))


SCHEMES: dict[str, Scheme] = {
    "ternary": _ternary(32), "W2": preset(2), "W3": preset(3), "W4": preset(4),
    "ternary g128": _ternary(128), "W2 g128": preset(2, group_size=128), "W3 g128": preset(3, group_size=128),
    "W4 g128": preset(4, group_size=128), "W2A8": _with_activations(2, "int8"), "W4A4": _with_activations(4, "int4"),
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """Every combination of models, schemes, losses (with each K), seeds and rates; denoisers have one loss.

    Args:
        models, schemes, losses, top_k, seeds, lr, scale_lr, ema, rest_lr: what is combined.
        steps, batch, samples: of training.
        start: post-training method where training starts.
        train: images to train on instead of the teacher's samples.
        fd: generated images for FD; 0 leaves it out.
        baselines: also a row of each post-training method.

    Raises:
        SystemExit: a scheme or a loss that there is not.
    """

    models: tuple[str, ...]
    schemes: tuple[str, ...] = tuple(SCHEMES)
    losses: tuple[str, ...] = LOSSES
    top_k: tuple[int, ...] = (HEAD,)
    seeds: tuple[int, ...] = (0, 1, 2)
    lr: tuple[float | str, ...] = (VARIED["lr"],)
    scale_lr: tuple[float | str, ...] = (VARIED["scale_lr"],)
    ema: tuple[float, ...] = (0.0,)
    rest_lr: tuple[float | str, ...] = (VARIED["rest_lr"],)
    steps: int = 400
    batch: int = VARIED["batch"]
    samples: int = VARIED["samples"]
    start: str = "gptq"
    train: Path | None = None
    fd: int = 0
    baselines: bool = True

    def __post_init__(self) -> None:
        for kind, given, known in (("scheme", self.schemes, SCHEMES), ("loss", self.losses, LOSSES)):
            for name in given:
                if name not in known:
                    raise SystemExit(f"{kind} {name!r} is none of {', '.join(known)}")

    @property
    def data(self) -> str:
        """What is trained on, as rows say it."""
        return "teacher" if self.train is None else self.train.stem


def sweep_of(given: Mapping[str, Any]) -> Sweep:
    """From plain data: lists for tuples, text for the path.

    Raises:
        SystemExit: a name that a sweep does not have.
    """
    known = [field.name for field in fields(Sweep)]
    for name in given:
        if name not in known:
            raise SystemExit(f"a sweep has no {name!r}; it has {', '.join(known)}")
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    train = values.pop("train", None)
    return Sweep(train=None if train is None else Path(train), **values)


def read_plan(path: Path, defaults: Mapping[str, Any]) -> list[Sweep]:
    """The sweeps of a plan."""
    return [sweep_of({**defaults, **item}) for item in json.loads(path.read_text())]


@dataclass(frozen=True)
class Job:
    """A row to be: what names it, and what it is made by. Without a loss it is a baseline."""

    row: Mapping[str, Any]
    sweep: Sweep
    stage: int = 0

    @property
    def model(self) -> str:
        """As in the row."""
        return self.row["model"]

    @property
    def trained(self) -> bool:
        """Whether it is no baseline."""
        return self.row["loss"] != NO_LOSS

    def setting(self, name: str) -> Any:
        """One of `VARIED`: the row's, or what it is where a row does not name it; None for `AUTO`."""
        value = self.row.get(name, VARIED[name])
        return None if value == AUTO else value

    @cached_property
    def digest(self) -> str:
        """Names the row among claims."""
        return hashlib.sha256(json.dumps(key_of(self.row)).encode()).hexdigest()[:16]


def rate_of(text: str) -> float | str:
    """A rate as the command line has it: a number, or `AUTO`."""
    return text if text == AUTO else float(text)


def said(setting: float | str | None) -> str:
    """A setting in a table."""
    return AUTO if setting in (None, AUTO) else f"{setting:g}"


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is known by."""
    return tuple(row.get(name) for name in KEY)


def jobs_of(sweeps: Iterable[Sweep]) -> list[Job]:
    """All rows that are asked for, in order, each once: as the first sweep that has it wants it."""
    found: dict[tuple[Any, ...], Job] = {}
    for stage, sweep in enumerate(sweeps):
        for row in _rows_of(sweep):
            found.setdefault(key_of(row), Job(row, sweep, stage))
    return list(found.values())


def _rows_of(sweep: Sweep) -> Iterator[dict[str, Any]]:
    fixed = {"samples": sweep.samples, "batch": sweep.batch}
    for model, scheme in product(sweep.models, sweep.schemes):
        same = {"model": model, "scheme": scheme}
        methods = dict.fromkeys((*BASELINES, sweep.start)) if sweep.baselines else ()
        for method in methods:
            yield {**same, "start": method, "loss": NO_LOSS, "data": None}
        losses = ("output-mse",) if find_model(model)[1].family == "dit" else sweep.losses
        kinds = [(loss, k) for loss in losses for k in (sweep.top_k if loss in TOPK_LOSSES else (None,))]
        rates = product(*(getattr(sweep, name) for name in RATES))
        for seed, (loss, top_k), rate in product(sweep.seeds, kinds, list(rates)):
            settings = dict(zip(RATES, rate, strict=True)) | fixed
            yield {
                **same, "start": sweep.start, "loss": loss, "top_k": top_k, "seed": seed, "steps": sweep.steps,
                "data": sweep.data, **{name: value for name, value in settings.items() if value != VARIED[name]},
            }  # fmt: skip


def claimed(jobs: Iterable[Job], folder: Path) -> Iterator[Job]:
    """Jobs that this process has claimed and nobody else will; see the module for the order.

    Where rows of the model that it had last are used up, a process goes on with the model of any free row, so that
    processes spread over models by how much there is to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(os.getpid())
    waiting, model = list(jobs), ""
    while waiting:
        stage = [job for job in waiting if job.stage == waiting[0].stage]
        job = next((job for job in stage if job.model == model), None)
        if job is None:
            free = [job for job in stage if not (folder / job.digest).exists()]
            if not free:
                waiting = waiting[len(stage) :]
                continue
            model = chance.choice(free).model
            job = next(job for job in free if job.model == model)
        waiting.remove(job)
        try:
            with (folder / job.digest).open("x") as file:
                file.write(json.dumps(job.row) + "\n")
        except FileExistsError:
            continue
        yield job
