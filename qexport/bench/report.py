"""What a run found: per contender and batch the spread of every graph, memory, sizes, rooflines; and what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexport.bench.ceilings import Ceilings
from qexport.bench.contender import FP16, FP32, Contender
from qexport.bench.process import Held
from qexport.bench.roofline import Roofline
from qexport.bench.timing import Ratio, Spread

NOT_ON_CUDA = "not measured on CUDA"


@dataclass(frozen=True)
class Batch:
    """One contender at one batch size: by graph and ``"total"``; `ratios` to each reference are of the total."""

    spreads: Mapping[str, Spread]
    images_per_s: float | None
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    rooflines: Mapping[str, Roofline] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "latency_ms": {name: spread.to_json() for name, spread in self.spreads.items()},
            "images_per_s": self.images_per_s,
            "times_as_fast_as": {name: ratio.to_json() for name, ratio in self.ratios.items()},
            "roofline": {name: roofline.to_json() for name, roofline in self.rooflines.items()},
        }


@dataclass(frozen=True)
class Row:
    """One contender: `load_s` from an empty process to a player, `held` above that process."""

    contender: Contender
    load_s: float | None
    held: Held
    batches: Mapping[int, Batch]
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.contender.name,
            "reference": self.contender.reference,
            "load_s": self.load_s,
            "file_bytes": self.contender.file_bytes,
            "memory_bytes": {"session": self.held.session, "peak": self.held.peak, "device": self.held.device},
            "batches": {str(size): batch.to_json() for size, batch in self.batches.items()},
            **({"failed": self.failed} if self.failed else {}),
        }


@dataclass
class BenchReport:
    """All of one run. `left_out` says what could not take part, and why."""

    rows: list[Row]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    ceilings: Ceilings | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """Where a quantised graph is slower than floating point, in words; and what was not measured."""
        found = [sentence for row in self.rows if not row.contender.reference for sentence in _of(row, self.rows)]
        if self.settings.get("provider") != "cuda":
            found.append(NOT_ON_CUDA)
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "ceilings": None if self.ceilings is None else self.ceilings.to_json(),
            "contenders": [row.to_json() for row in self.rows],
            "words": self.words(),
            "left_out": dict(self.left_out),
        }


def _of(row: Row, rows: Sequence[Row]) -> list[str]:
    base = {other.contender.name: other for other in rows}
    sentences = []
    for size, batch in row.batches.items():
        for name in (FP32, FP16):
            ratio = batch.ratios.get(name)
            if ratio is None or ratio.verdict != "slower":
                continue
            ours, theirs = batch.spreads["total"].median, base[name].batches[size].spreads["total"].median
            sentences.append(
                f"{row.contender.name} is slower than {name} at batch {size}: {ours:.3g} ms, {name} {theirs:.3g} ms "
                f"({ratio.median:.2f} times as fast)"
            )
    return sentences
