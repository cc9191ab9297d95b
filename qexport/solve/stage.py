"""One stage solved: statistics, folding, activation scales, codes.

Shape suffixes: O outputs, I inputs of a layer as a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qexport.algorithms import get_algorithm, get_smoother
from qexport.calibrate import Histogram, InputSums, Replay, Stage, choose, remarks_on, rows_of
from qexport.errors import InputError
from qexport.family import Fold, Generator
from qexport.numerics.statistics import InputStatistics
from qexport.recipe import Rule
from qexport.reference import Window, apply_fold
from qexport.scheme import ActivationSpec, PerStep, TensorSpec
from qexport.solve.needs import measures_activation, needs_statistics
from qexport.solve.peculiar import on_constant, on_smoothed, on_solved
from qexport.solve.result import StageResult


@dataclass(frozen=True)
class StageLayers:
    """The layers of one stage that are to be quantised: rules and weights by name, and the folds that are asked for.

    `outputs` has those whose output is rounded.
    """

    rules: Mapping[str, Rule]
    weights: Mapping[str, Tensor]
    folds: tuple[Fold, ...]
    outputs: Mapping[str, ActivationSpec] = field(default_factory=dict)


def layers_of(
    generator: Generator,
    stage: Stage,
    rules: Mapping[str, Rule],
    places: Mapping[str, tuple[str, str]],
    outputs: Mapping[str, ActivationSpec],
) -> StageLayers:
    """What is to be done in a stage, `outputs` being the layers whose output is rounded, of all stages.

    Raises:
        InputError: a fold whose absorbers or layers lie in another stage, which would be solved by then.
    """
    own = {layer: rule for layer, rule in rules.items() if _in(stage, places[layer])}
    parameters = generator.graph(stage.graph).parameters()
    folds = tuple(
        fold
        for fold in generator.folds
        if fold.graph == stage.graph and any(layer in own and own[layer].smooth for layer in fold.layers)
    )
    for fold in folds:
        names = [generator.layers[layer][1] for layer in fold.layers]
        for name in (*names, *(absorber.parameter for absorber in fold.absorbers)):
            if name not in stage.parameters:
                raise InputError(f"fold {fold.name!r} reaches out of {stage.name!r}, to {name}; the family is at fault")
    weights = {layer: parameters[places[layer][1]] for layer in own}
    return StageLayers(own, weights, folds, {layer: outputs[layer] for layer in own if layer in outputs})


def solve_stage(generator: Generator, replay: Replay, layers: StageLayers) -> StageResult:
    """Everything that is found out about one stage. Folds are in the model afterwards, codes are not.

    Raises:
        InputError: inputs that are not finite, a layer that is never reached, or an algorithm refuses.
    """
    summed = {layer: layers.weights[layer] for layer, rule in layers.rules.items() if needs_statistics(rule)}
    parameters = generator.graph(replay.stage.graph).parameters()
    for fold in layers.folds:  # all its layers read the same input: one is enough
        summed[fold.layers[0]] = parameters[generator.layers[fold.layers[0]][1]]
    measured = {layer: layers.weights[layer] for layer, rule in layers.rules.items() if measures_activation(rule)}
    sums = {layer: InputSums(_matrix(weight).shape[1]) for layer, weight in summed.items()}
    histograms = {layer: _histograms(generator, layers.rules[layer]) for layer in measured}
    made = {layer: Histogram() for layer in layers.outputs}
    together = not layers.folds  # folding changes what flows in: then histograms wait for it
    if summed:
        _observe(replay, summed, sums, *((histograms, measured, made) if together else ({}, {}, {})))
    statistics = {layer: found.statistics() for layer, found in sums.items()}
    for layer, found in statistics.items():
        found.check(_matrix(summed[layer]).shape[1], layer)

    result = StageResult(remarks=[r for layer, found in sums.items() for r in on_constant(layer, found.constant())])
    for fold in layers.folds:
        asking = [layer for layer in fold.layers if layer in layers.rules and layers.rules[layer].smooth]
        weights = [matrix_of(layers.weights[layer]) for layer in asking]
        result.remarks += on_smoothed(fold.name, weights, statistics[fold.layers[0]])
        factor_I = _factor(fold, asking, weights, layers, statistics[fold.layers[0]])
        result.smooth[fold.name] = factor_I
        apply_fold(generator, fold, factor_I)
        statistics |= {layer: statistics[layer].divided(factor_I) for layer in fold.layers if layer in statistics}
    if measured and not (together and summed):
        _observe(replay, {}, {}, histograms, measured, made)
    for layer, rule in layers.rules.items():
        if rule.activation is not None:
            result.activations[layer] = choose(histograms.get(layer, ()), rule.activation, layer)
            result.remarks += remarks_on(histograms.get(layer, ()), layer)
        if layer in layers.outputs:
            result.outputs[layer] = choose([made[layer]], layers.outputs[layer], layer)
        if needs_statistics(rule):
            spec = cast(TensorSpec, rule.weight)
            result.remarks += on_solved(layer, statistics[layer])
            result.weights[layer] = get_algorithm(rule.algorithm)(
                matrix_of(layers.weights[layer]), spec, statistics=statistics[layer], name=layer
            )
    return result


def matrix_of(weight: Tensor) -> npt.NDArray[np.float32]:
    """The weight as (outputs, inputs)."""
    return np.ascontiguousarray(_matrix(weight).numpy())


def _observe(
    replay: Replay,
    summed: Mapping[str, Tensor],
    sums: Mapping[str, InputSums],
    histograms: Mapping[str, list[Histogram]],
    measured: Mapping[str, Tensor],
    made: Mapping[str, Histogram],
) -> None:
    """One pass through the stage; `made` takes up what comes out of layers."""
    weights = {**summed, **measured}

    def tap(layer: str, x: Tensor, window: Window | None, step: int | None) -> Tensor:
        if layer in sums:
            for rows in rows_of(x, tuple(weights[layer].shape[2:]), window, layer):
                sums[layer].add(rows)
        if layer in histograms:
            found = histograms[layer]
            try:
                found[step if len(found) > 1 and step is not None else 0].add(x)
            except InputError as error:
                raise InputError(f"{layer}: its input {error}") from error
        return x

    def after(layer: str, y: Tensor) -> Tensor:
        if layer in made:
            try:
                made[layer].add(y)
            except InputError as error:
                raise InputError(f"{layer}: its output {error}") from error
        return y

    replay.run(weights, tap, after)


def _histograms(generator: Generator, rule: Rule) -> list[Histogram]:
    steps = generator.steps
    per_step = rule.activation is not None and isinstance(rule.activation.scales, PerStep)
    return [Histogram() for _ in range(steps.count if per_step and steps is not None else 1)]


def _factor(
    fold: Fold,
    asking: Sequence[str],
    weights: Sequence[npt.NDArray[np.float32]],
    layers: StageLayers,
    statistics: InputStatistics,
) -> npt.NDArray[np.float32]:
    """The factor that the layers `asking` for it want; layers of the fold without such a rule follow along unharmed."""
    methods = {cast(str, layers.rules[layer].smooth) for layer in asking}
    if len(methods) > 1:
        raise InputError(f"layers {', '.join(asking)} share their input, but are to be smoothed differently")
    specs = [cast(TensorSpec, layers.rules[layer].weight) for layer in asking]
    activations = {layers.rules[layer].activation for layer in asking}
    shared = activations.pop() if len(activations) == 1 else None
    return get_smoother(methods.pop())(weights, specs, statistics, activation=shared, name=fold.name)


def _in(stage: Stage, place: tuple[str, str]) -> bool:
    graph, parameter = place
    return graph == stage.graph and parameter in stage.parameters


def _matrix(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1).to(torch.float32)
