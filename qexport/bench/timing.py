"""Contenders in turns (A B C, B C A, …), which spreads the machine's drift over all of them.

Each turn plays every contender once, and the one that begins moves on. Ratios are of times of the same turn. Warm-up
turns are played and not counted.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qexport.bench.process import Racer

WARM_UP = 2
RUNS = 10
FEWEST_RUNS = 3
"""Below this, median and spread say nothing."""

BUDGET_S = 300.0
"""For one batch size; turns stop after it, but not before `FEWEST_RUNS`."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds: median, quartiles, least and greatest of so many runs."""

    median: float
    quarter: float
    three_quarters: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """From measured seconds."""
        ms = np.asarray(seconds) * 1e3
        low, high = (float(value) for value in np.percentile(ms, [25, 75]))
        return cls(float(np.median(ms)), low, high, float(ms.min()), float(ms.max()), len(ms))

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {
            "median": self.median, "p25": self.quarter, "p75": self.three_quarters,
            "min": self.least, "max": self.greatest, "runs": self.runs,
        }  # fmt: skip


@dataclass
class Turns:
    """Seconds of every counted turn at one batch size: by contender, by graph (or `TOTAL`), None where it failed."""

    batch: int
    seconds: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))

    def spread(self, name: str, graph: str) -> Spread:
        """Of one graph of one contender."""
        return Spread.of([turn[graph] for turn in self.seconds[name]])

    def ratio(self, base: str, name: str, graph: str) -> Ratio:
        """How many times faster `name` is than `base`: of the turns that both played."""
        pairs = zip(self.seconds[base], self.seconds[name], strict=False)
        ratios = [ours[graph] and theirs[graph] / ours[graph] for theirs, ours in pairs]
        low, high = (float(value) for value in np.percentile(ratios, [25, 75]))
        return Ratio(statistics.median(ratios), low, high, len(ratios))


@dataclass(frozen=True)
class Ratio:
    """Of times in the same turn: median and quartiles. Above 1, ours is the faster."""

    median: float
    quarter: float
    three_quarters: float
    turns: int

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, or ``"as fast"`` where the middle half of the turns lies on both sides of 1.

        ``"too few turns"`` below `FEWEST_RUNS` of them.
        """
        if self.turns < FEWEST_RUNS:
            return "too few turns"
        if self.quarter > 1:
            return "faster"
        return "slower" if self.three_quarters < 1 else "as fast"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"median": self.median, "p25": self.quarter, "p75": self.three_quarters, "verdict": self.verdict}


def race(
    racers: Sequence[Racer],
    batch: int,
    warm_up: int = WARM_UP,
    runs: int = RUNS,
    tell: Callable[[int, int], None] | None = None,
    budget_s: float = BUDGET_S,
) -> Turns:
    """All turns at one batch size; a racer that fails is out from then on, and its turns do not count."""
    turns = Turns(batch)
    start = time.perf_counter()
    for turn in range(warm_up + runs):
        counted = turn - warm_up
        if counted >= FEWEST_RUNS and (time.perf_counter() - start) * (turn + 1) / turn > budget_s:
            break
        for racer in [*racers[turn % len(racers) :], *racers[: turn % len(racers)]]:
            seconds = None if racer.failed else racer.play(batch)
            if seconds is not None and counted >= 0:
                turns.seconds[racer.contender.name].append(seconds)
        if tell is not None:
            tell(turn + 1, warm_up + runs)
    for racer in racers:
        if racer.failed:
            turns.seconds.pop(racer.contender.name, None)
    return turns
