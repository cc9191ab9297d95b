"""What quantisation may make use of: where smoothing hides, and which steps may have scales of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Absorber:
    """Rows of a parameter that can take up a factor: ``P[first:last] ← (P[first:last] + offset) / factor − offset``.

    `parameter` is the name of an initialiser of the graph, `offset` what the graph adds to these rows before it
    multiplies by them (adaptive layer norm multiplies by 1 + scale, so the bias of its scale rows has offset 1).
    """

    parameter: str
    first: int
    last: int
    offset: float = 0.0


@dataclass(frozen=True)
class Fold:
    """A place where the input x of some layers may become x / factor, channel by channel, at no cost.

    `layers` are all that read this input: their columns are multiplied by the factor, `absorbers` take up its inverse,
    and the model computes what it did. `name` is for messages and files.
    """

    name: str
    graph: str
    layers: tuple[str, ...]
    absorbers: tuple[Absorber, ...]


@dataclass(frozen=True)
class StepSpec:
    """The steps that may have activation scales of their own.

    `graph` is called at steps 0 … `count` − 1. A call with one entry per iteration has step = iteration; a call that
    repeats over the rows of a schedule's table has the step ``index[table][row]``, an integer array. `of_timestep` is
    the step of each training timestep of a denoiser, for quality figures at any timestep.
    """

    graph: str
    count: int
    index: Mapping[str, np.ndarray] = field(default_factory=dict)
    of_timestep: np.ndarray | None = None
