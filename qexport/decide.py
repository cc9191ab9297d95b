"""From a request to a recipe for one model: straight away, by trying methods, or by measuring every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from qexport.bundle.reports import COMPARE_REPORT, SENSITIVITY_PLOT, SENSITIVITY_REPORT
from qexport.family import Generator
from qexport.quantize import assign_rules
from qexport.recipe import Recipe
from qexport.request import Budget, Request

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Decision:
    """The recipe, and what was measured on the way: files for the bundle's reports, by name."""

    recipe: Recipe
    reports: dict[str, bytes] = field(default_factory=dict)


def decide(generator: Generator, request: Request, progress: Progress) -> Decision:
    """The recipe that `request` means for this model. `generator` is full precision and is not changed.

    Raises:
        InputError: the request does not fit the model.
    """
    if request.budget is not None:
        return _by_sensitivity(generator, request, request.budget, progress)
    if request.compare:
        return _by_trial(generator, request, progress)
    return Decision(request.recipe(generator))


def _by_trial(generator: Generator, request: Request, progress: Progress) -> Decision:
    from qexport.compare import compare, make_judge, merit_name

    recipes = {method.name: request.recipe(generator, method) for method in request.compare}
    for recipe in recipes.values():
        assign_rules(generator, recipe)  # what does not fit is said before the slow part
    progress("compare", 0, len(recipes))
    rows = compare(generator, recipes, make_judge(generator), progress)
    best = min(rows, key=lambda row: row.merit)
    report = {
        "model": generator.entry.name,
        "scheme": request.scheme.name,
        "merit": merit_name(generator),
        "chosen": best.method,
        "calibration": request.calibration(generator).to_json(),
        "rows": [row.to_json() for row in rows],
    }
    return Decision(recipes[best.method], {COMPARE_REPORT: _json(report)})


def _by_sensitivity(generator: Generator, request: Request, budget: Budget, progress: Progress) -> Decision:
    from qexport.auto import check_budget, choose, measure_sensitivity, to_recipe
    from qexport.auto.plot import sensitivity_plot
    from qexport.compare import make_judge, merit_name

    trial = replace(request, budget=None, decoder=None)
    layers = list(assign_rules(generator, trial.recipe(generator)))
    shapes = [_shape(generator, layer) for layer in layers]
    weights = sum(rows * columns for rows, columns in shapes)
    bits = int(budget.bits_per_weight * weights) if budget.bits_per_weight else int(budget.size_bytes or 0) * 8
    check_budget(shapes, bits)
    progress("sensitivity", 0, len(layers))
    judge = make_judge(generator)
    rows = measure_sensitivity(
        generator,
        layers,
        judge,
        progress=lambda done, total: progress("sensitivity", done, total),
        activation=request.scheme.activation,
        calibration=request.calibration(generator),
    )
    chosen = choose(rows, bits)
    recipe = to_recipe(
        request.name,
        chosen,
        request.method.algorithm,
        smooth=request.method.smooth,
        activation=request.scheme.activation,
        calibration=request.calibration(generator),
    )
    recipe = replace(recipe, rules=(*recipe.rules, *request.decoder_rules(generator)))
    report = {
        "model": generator.entry.name,
        "merit": merit_name(generator),
        "budget_bits": bits,
        "spent_bits": sum(choice.bits for choice in chosen.values()),
        "predicted": sum(choice.cost for choice in chosen.values()),
        "chosen": {layer: str(choice.spec) for layer, choice in chosen.items()},
        "rows": [row.to_json() for row in rows],
    }
    plot = sensitivity_plot(rows, chosen, merit_name(generator))
    return Decision(recipe, {SENSITIVITY_REPORT: _json(report), SENSITIVITY_PLOT: plot.encode()})


def _shape(generator: Generator, layer: str) -> tuple[int, int]:
    graph, name = generator.layers[layer]
    rows, columns = generator.graph(graph).parameters()[name].shape
    return int(rows), int(columns)


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()
