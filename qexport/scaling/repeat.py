"""The command that makes a run's bundle: `qexport quantize` with every setting of the run that is not its default.

Settings are compared with the defaults of today, so that a run keeps its command's meaning when a default moves. What
the command cannot give back is the machine: figures of another one differ in their last digits, and GPTQ at few bits
by more, where roundings decide codes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qexport.family import find_model
from qexport.request import DEFAULT_METHOD
from qexport.scaling.grid import FULL, NO_METHOD
from qexport.scaling.store import Row

CHECKPOINT_FILE = "checkpoint_file"
"""In a row's settings: the name of the file that was given for its model, where one was."""

_OWN_OPTION = {"steps": "--steps", "batch": "--batch", "lr": "--lr"}
_OF_THE_LOSS = {"loss": "--variant", "top_k": "--top-k"}
_SAID_ELSEWHERE = ("seed", "checkpoint_every")
"""The seed is the request's; how often a checkpoint is written decides nothing."""


def command_for(row: Row, file: str | None = None) -> str:
    """The command that makes this bundle; `file` holds the model's weights, else the name that they go by."""
    run = row.run
    parts = ["qexport", "quantize", "--model", run.model, "--wbits", str(run.bits)]
    if run.kind == "fp" and run.number_format != FULL:
        parts += ["--format", "fp8"]
    if run.trained:
        training = row.settings["training"]
        parts += ["--method", training["start_method"], "--topkld", *_training(training["settings"])]
    elif run.method not in (NO_METHOD, DEFAULT_METHOD.name):
        parts += ["--method", run.method]
    seed = row.settings["measurement"]["seed"]
    if seed and run.method != NO_METHOD:
        parts += ["--seed", str(seed)]
    file = file or _file_of(row)
    if file is not None:
        parts += ["--checkpoint", file]
    return shlex.join(parts)


def weights_of(row: Row) -> str:
    """Which file ``--checkpoint`` has to name, by its digest; empty where the bundled weights do."""
    if _file_of(row) is None:
        return ""
    digest = row.settings.get("checkpoints", {}).get("model")
    return f"--checkpoint: the weights of {row.run.model}" + (f", SHA-256 {digest}" if digest else "")


def _file_of(row: Row) -> str | None:
    """The name of the file with the model's weights; None where those that are bundled were measured."""
    _, entry = find_model(row.run.model)
    given = row.settings.get(CHECKPOINT_FILE)
    if given is not None:
        return str(given)
    return None if entry.bundled else entry.files[0]


def _training(settings: Mapping[str, Any]) -> list[str]:
    """Options of `DistillSettings` that differ from its defaults; ``--steps`` always."""
    from qexport.distill.settings import DistillSettings  # with torch, which only rows that were trained need

    usual = asdict(DistillSettings())
    settings = {**settings, "rest_lr": settings.get("rest_lr", 0.0)}  # not recorded where it is 0
    parts = ["--steps", str(settings["steps"])]
    loss = settings.get("loss", {})
    for name, option in _OF_THE_LOSS.items():
        if name in loss and loss[name] != usual["loss"][name]:
            parts += [option, str(loss[name])]
    if loss.get("boost", usual["loss"]["boost"]) != usual["loss"]["boost"]:
        parts += ["--train", f"boost={loss['boost']}"]
    for name, value in settings.items():
        if name in ("loss", "steps", *_SAID_ELSEWHERE) or name not in usual or value == usual[name]:
            continue
        own = _OWN_OPTION.get(name)
        parts += [own, str(value)] if own else ["--train", f"{name}={_text(value)}"]
    return parts


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
