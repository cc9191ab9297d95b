"""Sensitivity per kind of layer: what is lost when one layer alone is rounded, put together by what the layer does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qexport.auto.plot import kind_of
from qexport.auto.sensitivity import Sensitivity, measure_sensitivity
from qexport.compare import Judge
from qexport.family import Generator
from qexport.formats import get_format
from qexport.quantize import assign_rules
from qexport.recipe import recipe_for
from qexport.scheme import DEFAULT_GROUP_SIZE, PerGroup, TensorSpec, preset

FORMATS = ("int4", "int2")


@dataclass(frozen=True)
class Kind:
    """Layers of one kind in one format: `cost` is the sum of what each costs alone, `weights` are all of theirs."""

    kind: str
    number_format: str
    layers: int
    weights: int
    cost: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the cost of a million weights."""
        return {
            "kind": self.kind, "format": self.number_format, "layers": self.layers, "weights": self.weights,
            "cost": self.cost, "cost_per_million": self.cost / self.weights * 1e6,
        }  # fmt: skip


def sensitivity_of_kinds(
    generator: Generator, judge: Judge, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Kind], list[Sensitivity]]:
    """Every kind among the default layers in each of `FORMATS`, groups of 32, and the single layers."""
    recipe = recipe_for(preset(4), generator.default_layers, "kinds")
    layers = list(assign_rules(generator, recipe))
    specs = [TensorSpec(get_format(name), PerGroup(DEFAULT_GROUP_SIZE)) for name in FORMATS]
    rows = measure_sensitivity(generator, layers, judge, specs, progress)
    return summed(rows), rows


def summed(rows: list[Sensitivity]) -> list[Kind]:
    """Single layers put together by kind and format."""
    groups: dict[tuple[str, str], list[Sensitivity]] = defaultdict(list)
    for row in rows:
        groups[kind_of(row.layer), row.spec.format.name].append(row)
    return [
        Kind(kind, name, len(own), sum(row.weights for row in own), sum(row.cost for row in own))
        for (kind, name), own in groups.items()
    ]
