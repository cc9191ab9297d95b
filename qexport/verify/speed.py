"""Speed and memory of a bundle, under the same options with which it is served.

Latency is wall-clock time of the generator on one batch, and of each graph summed over its calls in it. Warm-up runs
are not counted; the median of the rest is given with the least and the greatest.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.runtime import Runtime
from qexport.runtime.inputs import label_input

WARM_UP_RUNS = 1
RUNS = 5
BATCH_SIZES = (1, 16)


@dataclass(frozen=True)
class Latency:
    """Milliseconds: median, least and greatest of `RUNS` runs."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From measured seconds."""
        ms = [s * 1e3 for s in seconds]
        return cls(statistics.median(ms), min(ms), max(ms))

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {"median": self.median, "min": self.least, "max": self.greatest}


@dataclass(frozen=True)
class Speed:
    """Latency by batch size: of the whole generator (``"total"``) and of each graph."""

    batches: Mapping[int, Mapping[str, Latency]]
    provider: str
    runs: int = RUNS
    warm_up: int = WARM_UP_RUNS

    def to_json(self) -> dict[str, Any]:
        """``batch_N`` → ``total`` or graph → ``median``, ``min``, ``max``; and ``runs``, ``warm_up``, ``options``."""
        data: dict[str, Any] = {
            f"batch_{size}": {name: value.to_json() for name, value in part.items()}
            for size, part in self.batches.items()
        }
        return {**data, "runs": self.runs, "warm_up": self.warm_up, "options": "serve", "provider": self.provider}


def measure_speed(runtime: Runtime, batch_sizes: Sequence[int] = BATCH_SIZES, runs: int = RUNS) -> Speed:
    """Time a runtime that was loaded with ``serve`` options."""
    return Speed({size: _measure(runtime, size, runs) for size in batch_sizes}, runtime.provider, runs)


def peak_memory_bytes() -> int | None:
    """The most memory that this process ever held (resident), in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _measure(runtime: Runtime, size: int, runs: int) -> dict[str, Latency]:
    port = label_input(runtime.bundle.plan)
    inputs = {port.name: np.arange(size) % runtime.bundle.manifest.model.num_classes} if port else {}
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in range(WARM_UP_RUNS + runs):
        graphs: dict[str, float] = defaultdict(float)
        start = last = time.perf_counter()

        def observe(record: Any, graphs: dict[str, float] = graphs) -> None:
            nonlocal last
            now = time.perf_counter()
            graphs[record.graph] += now - last
            last = now

        runtime.player.play(inputs, seed=run, batch=size, observer=observe)
        total = time.perf_counter() - start
        if run >= WARM_UP_RUNS:
            for name, value in {"total": total, **graphs}.items():
                seconds[name].append(value)
    return {name: Latency.of(values) for name, values in seconds.items()}
