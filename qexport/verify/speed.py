"""Speed and memory of a bundle, under the same options with which it is served.

Latency is wall-clock time of the generator on one batch, and of each graph summed over its calls in it. Warm-up runs
are not counted; the median of the rest is given with the least and the greatest. Where a batch takes so long that all
runs would exceed `BUDGET_S`, there are fewer, at least one, and a larger batch that would take longer is left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qexport.runtime import Player, Runtime
from qexport.runtime.clock import play_once, some_labels

WARM_UP_RUNS = 1
RUNS = 5
BATCH_SIZES = (1, 16)
BUDGET_S = 30.0
"""For each batch size; the reference models stay far below it."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds: median, least and greatest of so many runs."""

    median: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From measured seconds."""
        ms = [s * 1e3 for s in seconds]
        return cls(statistics.median(ms), min(ms), max(ms), len(ms))

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {"median": self.median, "min": self.least, "max": self.greatest, "runs": self.runs}


@dataclass(frozen=True)
class Speed:
    """Latency by batch size: of the whole generator (``"total"``) and of each graph; sizes that took too long."""

    batches: Mapping[int, Mapping[str, Latency]]
    provider: str
    schedule: str = ""
    left_out: tuple[int, ...] = ()
    warm_up: int = WARM_UP_RUNS

    def to_json(self) -> dict[str, Any]:
        """``batch_N`` → ``total`` or graph → ``median``, ``min``, ``max``, ``runs``; and the settings."""
        data: dict[str, Any] = {
            f"batch_{size}": {name: value.to_json() for name, value in part.items()}
            for size, part in self.batches.items()
        }
        settings = {"warm_up": self.warm_up, "options": "serve", "provider": self.provider}
        return {**data, **settings, **({"schedule": self.schedule} if self.schedule else {})}


def measure_speed(
    runtime: Runtime, schedule: str | None = None, batch_sizes: Sequence[int] = BATCH_SIZES, runs: int = RUNS
) -> Speed:
    """Time a runtime that was loaded with ``serve`` options, by a schedule of its plan (None: the default)."""
    player = runtime.player if schedule is None else runtime.player.with_schedule(schedule)
    found: dict[int, dict[str, Latency]] = {}
    image_s = 0.0
    sizes = sorted(batch_sizes)
    for size in sizes:
        if found and size * image_s * (WARM_UP_RUNS + 1) > BUDGET_S:
            break
        found[size] = _measure(runtime, player, size, runs)
        image_s = found[size]["total"].median / 1e3 / size
    return Speed(found, runtime.provider, player.plan.schedule, tuple(sizes[len(found) :]))


def peak_memory_bytes() -> int | None:
    """The most memory that this process ever held (resident), in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _measure(runtime: Runtime, player: Player[Any], size: int, runs: int) -> dict[str, Latency]:
    inputs = some_labels(player, size, runtime.bundle.manifest.model.num_classes)
    seconds: dict[str, list[float]] = defaultdict(list)
    begin = time.perf_counter()
    for run in range(WARM_UP_RUNS + runs):
        spent_s = time.perf_counter() - begin
        if run > WARM_UP_RUNS and spent_s * (run + 1) / run > BUDGET_S:
            break
        for name, value in play_once(player, inputs, size).items():
            if run >= WARM_UP_RUNS:
                seconds[name].append(value)
    return {name: Latency.of(values) for name, values in seconds.items()}
