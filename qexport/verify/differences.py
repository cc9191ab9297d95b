"""Accumulating how far one backend's outputs are from the other's: per graph, iteration and port.

Ports that differ only in a number (``key.0``, ``key.1`` …) form a *group*, ``key.*``; a group's figure is that of its
worst port, so that one bad layer is not averaged away by good ones.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from qexport.plan import Dim

CHUNK = 1 << 13
"""Numbers that are widened to float64 at a time: 64 KiB, below what wakes the threads of BLAS for a dot product."""

_NUMBER = re.compile(r"\d+")


def group_of(port: str) -> str:
    """The group of a port: its name with every number replaced by ``*``."""
    return _NUMBER.sub("*", port)


@dataclass
class Sums:
    """Σ (a − b)², Σ b² and max |a − b|, float64."""

    error: float = 0.0
    power: float = 0.0
    max_abs: float = 0.0

    def add(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """Add all elements of two arrays of the same shape; NaN stays NaN."""
        if not wanted.size:
            return
        flat, flat_wanted = found.reshape(-1), wanted.reshape(-1)
        for start in range(0, wanted.size, CHUNK):  # a cache of gigabytes must not be held thrice over in float64
            reference = flat_wanted[start : start + CHUNK].astype(np.float64)
            difference = flat[start : start + CHUNK] - reference
            self.error += float(np.vdot(difference, difference))
            self.power += float(np.vdot(reference, reference))
            self.max_abs = float(np.fmax.reduce([self.max_abs, np.abs(difference).max()]))

    @property
    def relative_l2(self) -> float:
        """‖a − b‖ / ‖b‖; 0 where nothing differs."""
        if math.isnan(self.error):
            return math.inf
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.power) if self.power else math.inf


Place = tuple[str, int, str]
"""Graph, iteration, port."""


@dataclass
class Differences:
    """Sums for every place that was compared."""

    sums: dict[Place, Sums] = field(default_factory=lambda: defaultdict(Sums))

    def add(self, graph: str, iteration: int, port: str, found: np.ndarray, wanted: np.ndarray) -> None:
        """Compare one output of one call; arrays of different shapes differ infinitely."""
        sums = self.sums[graph, iteration, port]
        if found.shape != wanted.shape:
            sums.error, sums.max_abs = math.nan, math.inf
        else:
            sums.add(found, wanted)

    def groups(self) -> dict[tuple[str, str], list[Place]]:
        """Places of each (graph, port group)."""
        found: dict[tuple[str, str], list[Place]] = defaultdict(list)
        for place in self.sums:
            found[place[0], group_of(place[2])].append(place)
        return dict(found)

    def worst(self, graph: str, group: str) -> tuple[float, Place]:
        """Greatest relative L2 of a group, over iterations and ports, and where it is."""
        places = self.groups()[graph, group]
        place = max(places, key=lambda p: self.sums[p].relative_l2)
        return self.sums[place].relative_l2, place

    def per_iteration(self, graph: str, group: str) -> list[float]:
        """Relative L2 of a group at each iteration, the worst port's."""
        out: dict[int, float] = {}
        for place in self.groups()[graph, group]:
            out[place[1]] = max(out.get(place[1], 0.0), self.sums[place].relative_l2)
        return [out[i] for i in sorted(out)]

    def max_abs(self, graph: str, group: str) -> float:
        """Greatest absolute difference of a group, over iterations and ports."""
        return max(self.sums[place].max_abs for place in self.groups()[graph, group])


def rows_of(images: np.ndarray, shape: tuple[Dim, ...], batch: int) -> np.ndarray | None:
    """Rows of an output that belong to the images marked True, or None if the output has no rows of images.

    An output of shape ``"N*batch"`` holds N copies of the batch one after the other.
    """
    first = shape[0] if shape else None
    if first == "batch":
        return images
    if isinstance(first, str) and first.endswith("*batch"):
        return np.tile(images, int(first.partition("*")[0]))
    return None
