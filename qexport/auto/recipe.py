"""From sensitivities and a budget to a recipe that says so, layer by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from qexport.auto.allocate import Choice, allocate
from qexport.auto.sensitivity import Sensitivity, largest_bits, smallest_bits
from qexport.errors import InputError
from qexport.recipe import Calibration, Recipe, Rule
from qexport.scheme import ActivationSpec


def check_budget(shapes: Collection[tuple[int, int]], budget_bits: int) -> None:
    """Refuse a budget that no choice can meet or use up, before anything is measured. Shapes are (outputs, inputs).

    Raises:
        InputError: the smallest formats take more, or the largest less; the message names what is in reach.
    """
    weights = sum(rows * columns for rows, columns in shapes)
    smallest, largest = smallest_bits(shapes), largest_bits(shapes)
    if not smallest <= budget_bits <= largest:
        size, instead = ("smallest", "") if budget_bits < smallest else ("largest", ", or quantise with --wbits 8")
        limit = smallest if budget_bits < smallest else largest
        low, high = math.ceil(100 * smallest / weights) / 100, math.floor(100 * largest / weights) / 100
        raise InputError(
            f"the budget is {budget_bits / weights:.3g} bits a weight ({budget_bits // 8:,} bytes); the {size} formats "
            f"take {limit / weights:.3g} ({limit // 8:,} bytes) with their scales: choose from {low:g} "
            f"to {high:g} bits{instead}"
        )


def choose(rows: Sequence[Sensitivity], budget_bits: int) -> dict[str, Choice]:
    """The format of each layer within the budget, see `allocate`."""
    offered: dict[str, list[Choice]] = defaultdict(list)
    for row in rows:
        offered[row.layer].append(Choice(row.spec, row.bits, row.cost))
    return allocate(offered, budget_bits)


def to_recipe(
    name: str,
    chosen: Mapping[str, Choice],
    algorithm: str,
    *,
    smooth: str | None = None,
    activation: ActivationSpec | None = None,
    calibration: Calibration | None = None,
) -> Recipe:
    """One rule a layer: the recipe can be read, edited and replayed with `--recipe`."""
    rules = tuple(Rule(layer, choice.spec, algorithm, smooth, activation) for layer, choice in chosen.items())
    return Recipe(name, rules, calibration=calibration or Calibration())
