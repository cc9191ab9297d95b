"""The installed families, and how a name, a checkpoint or a seed becomes one of their models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from qexport.errors import InputError
from qexport.family.entry import ModelEntry
from qexport.family.generator import Generator
from qexport.suggest import nearest

ENTRY_POINT_GROUP = "qexport.models"

RANDOM_SUFFIX = "-random"
_RANDOM_SOURCE = "random weights, seed {}: not a model"
_RANDOM_LICENCE = "none: random numbers"

Recognise = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], Sequence[str]]
"""Shapes by key, and the ``config.json`` that lay beside the weights (or nothing) → names of the entries that fit."""

Describe = Callable[[Mapping[str, tuple[int, ...]]], str | None]
"""Shapes by key → what these weights are, in words that follow "these weights are"; None if that is not known."""


@dataclass(frozen=True)
class Family:
    """A family of models: its name, its entries, and how to build one.

    `load(entry, checkpoint, vae_checkpoint)` returns a `Generator` on the CPU in float32, evaluation mode. Paths
    that are None mean the bundled or already downloaded file.

    Optional: `recognise` names the entries that a state dict may be; `random(entry, seed)` builds one of published
    shape without its file, its entry marked by `random_entry`; `describe` says what weights are that no entry of any
    family fits (a neighbour that is not supported, another size), for the refusal.
    """

    name: str
    entries: tuple[ModelEntry, ...]
    load: Callable[[ModelEntry, str | None, str | None], Generator]
    recognise: Recognise | None = None
    random: Callable[[ModelEntry, int], Generator] | None = None
    describe: Describe | None = None


def families() -> tuple[Family, ...]:
    """Every installed family, in order of name."""
    found = [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    return tuple(sorted(found, key=lambda family: family.name))


def find_model(name: str) -> tuple[Family, ModelEntry]:
    """The family and entry of the model called `name`.

    Raises:
        InputError: no such model; the message suggests the nearest names.
    """
    known = {entry.name: (family, entry) for family in families() for entry in family.entries}
    if name not in known:
        raise InputError(f"unknown model {name!r}{nearest(name, known)}; `qexport models` lists all {len(known)}")
    return known[name]


def recognise(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None, file: str | None = None
) -> ModelEntry:
    """The entry that a state dict belongs to.

    Args:
        shapes: shape of every tensor by key, see `qexport.checkpoint.Checkpoint`.
        config: the ``config.json`` beside the weights, where there is one.
        file: name of the weight file; decides only between entries that look alike.

    Raises:
        InputError: no family knows these shapes, or several models have them.
    """
    known = families()
    entries = {entry.name: entry for family in known for entry in family.entries}
    hooks = [family.recognise for family in known if family.recognise]
    fitting = [entries[name] for hook in hooks for name in hook(shapes, config or {}) if name in entries]
    named = [entry for entry in fitting if file in entry.files]
    if len(fitting) == 1 or len(named) == 1:
        return (named or fitting)[0]
    if not fitting:
        for family in known:
            if family.describe and (what := family.describe(shapes)):
                raise InputError(f"these weights are {what}")
        keys = ", ".join(list(shapes)[:3])
        raise InputError(f"these weights (they begin {keys}) are of no model that is known; pass --model NAME")
    names = " or ".join(entry.name for entry in fitting)
    raise InputError(f"these weights may be {names}, which have the same shapes; pass --model NAME")


def random_entry(entry: ModelEntry, seed: int) -> ModelEntry:
    """`entry` marked, in name and source, as filled with random numbers, so that nobody takes it for a model."""
    source = _RANDOM_SOURCE.format(seed)
    return replace(entry, name=entry.name + RANDOM_SUFFIX, source=source, licence=_RANDOM_LICENCE, bundled=False)


def random_seed(source: str) -> int | None:
    """The seed in a source that `random_entry` wrote (a manifest has it); None for the weights of a model."""
    before, after = _RANDOM_SOURCE.split("{}")
    text = source.removeprefix(before).removesuffix(after)
    return int(text) if source == before + text + after and text.isdecimal() else None


def load_random(name: str, seed: int) -> Generator:
    """A model of published shape, filled with random numbers; `name` with or without `RANDOM_SUFFIX`.

    Raises:
        InputError: no such model, a family that offers none, or a negative seed.
    """
    family, entry = find_model(name.removesuffix(RANDOM_SUFFIX))
    if family.random is None:
        raise InputError(f"{entry.name}: the family {family.name!r} offers no random weights")
    if seed < 0:
        raise InputError(f"--random-weights {seed}: the seed must be 0 or greater")
    return family.random(entry, seed)
