"""What a rung of the ladder reports: checks that passed or failed, and rungs that were skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True)
class Place:
    """Where a figure was found: a graph, a node, initialiser or port of it, and which call of the graph."""

    graph: str = ""
    node: str = ""
    iteration: int | None = None

    def __str__(self) -> str:
        graph = self.graph if self.iteration is None else f"{self.graph}[{self.iteration}]"
        return "/".join(part for part in (graph, self.node) if part)


NOWHERE = Place()


@dataclass(frozen=True)
class Check:
    """One figure held against one limit.

    `value` and `limit` are in `unit`; the check passes where value ≤ limit, and never where the value is NaN.
    `place` is that of the greatest figure. `detail` is a sentence for people.
    """

    name: str
    value: float
    limit: float
    passed: bool
    place: Place = NOWHERE
    detail: str = ""
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; a value that JSON cannot hold is None."""
        return {
            "name": self.name,
            "value": self.value if math.isfinite(self.value) else None,
            "limit": self.limit if math.isfinite(self.limit) else None,
            "unit": self.unit,
            "passed": self.passed,
            "where": str(self.place),
            "graph": self.place.graph,
            "node": self.place.node,
            "detail": self.detail,
        }


def at_most(name: str, value: float, limit: float, place: Place = NOWHERE, detail: str = "", unit: str = "") -> Check:
    """A check that passes where value ≤ limit."""
    return Check(name, float(value), float(limit), bool(value <= limit), place, detail, unit)


def failed(name: str, place: Place, detail: str) -> Check:
    """A check that could not be carried out because something is broken."""
    return Check(name, math.nan, 0.0, False, place, detail)


@dataclass(frozen=True)
class Skipped:
    """A rung that was not climbed, and why."""

    name: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"name": self.name, "reason": self.reason}
