"""The staged solver: stage by stage through the graphs that need calibration.

Every stage sees what the stages before it, quantised, hand on, while the trajectories are those of the full-precision
model (as GPTQ does block by block, arXiv:2210.17323, section 3.3). Within a stage all layers are solved for the inputs
that the unquantised stage gives them. Solving them one after another, each for what the rounded ones before it hand on
("true sequential"), was measured and left out: on var-c10-d2 with GPTQ in groups of 32 and 64 samples it took KL from
0.00384 to 0.00389 at 4 bits, 0.01635 to 0.01574 at 3 and 0.06813 to 0.06906 at 2, for more passes.

NumPy's BLAS gets one thread: the products of GPTQ are small, and threads that wait for each other cost four times the
work on a busy machine; besides, the same codes are promised only for the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from qexport.algorithms import get_algorithm
from qexport.calibrate import Replay, choose, record, stages
from qexport.errors import InputError
from qexport.family import Generator
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import assign_rules, output_specs, places_of
from qexport.recipe import Recipe, Rule
from qexport.reference import Window, apply_folds, fake_quantise
from qexport.scheme import PerStep
from qexport.solution import Solution
from qexport.solve.needs import needs_calibration, needs_inputs
from qexport.solve.peculiar import on_left_out, on_unsmoothed
from qexport.solve.result import StageResult, Workplace, merge
from qexport.solve.stage import StageLayers, layers_of, matrix_of, solve_stage

Progress = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all)."""


def solve(
    generator: Generator, recipe: Recipe, *, work: Path | None = None, progress: Progress | None = None
) -> Solution:
    """Find out what the recipe leaves to calibration.

    The generator is changed in place: smoothing factors are folded into it. Its weights are not rounded, so that
    `qexport.quantize.stored_weights` of it, with the recipe and this solution, gives what goes to disk. `weights` of
    the solution has the layers whose algorithm needs to see inputs; others are computed again from the folded weight.

    Args:
        generator: the full-precision model.
        recipe: what to do with it; a recipe that needs no inputs gives an empty solution at once.
        work: folder for what was recorded, the results of finished stages and what those hand on. A run that was
            killed goes on from there, and ends with the very same bits as one that was not. Without one, recorded calls
            lie in a temporary folder.
        progress: told how far it is.

    Raises:
        InputError: the recipe does not fit the model, a rule smooths layers where nothing can be folded, inputs that
            are not finite, a layer or step that the trajectories never reach, two smoothers for one input.
    """
    rules = assign_rules(generator, recipe)
    if not needs_calibration(rules.values()):
        return Solution()
    tell = progress or (lambda what, done, total: None)
    _require_folds(generator, rules, recipe)
    places = places_of(generator, rules)
    unseen = {  # scales per token need no calibration, but the solution says that they are wanted
        layer: choose((), rule.activation, layer)
        for layer, rule in rules.items()
        if rule.activation and not needs_inputs(rule)
    }
    graphs = {places[layer][0] for layer, rule in rules.items() if needs_inputs(rule)}
    results = [StageResult(activations=unseen, remarks=list(on_unsmoothed(generator, rules)))]
    specs = [spec for spec in generator.graphs if spec.name in graphs]
    workplace = None if work is None else Workplace(work, generator, recipe)
    total = sum(len(stages(spec)) for spec in specs)
    if specs:
        trajectories = record(
            generator,
            recipe.calibration,
            graphs,
            lambda done, total: tell("sample", done, total),
            workplace.folder / "calls" if workplace else None,
        )
        results[0].remarks += on_left_out(trajectories.left_out)
        for spec in specs:
            replay = Replay(generator, spec.name, trajectories, workplace.folder / "wires" if workplace else None)
            outputs = output_specs(generator, rules)
            layers = [layers_of(generator, stage, rules, places, outputs) for stage in replay.stages]
            for found in _solve_graph(generator, replay, layers, workplace, len(results) - 1):
                results.append(found)
                tell("solve", len(results) - 1, total)
    return merge(generator, results)


def _solve_graph(
    generator: Generator,
    replay: Replay,
    layers: Sequence[StageLayers],
    workplace: Workplace | None,
    first: int,
) -> Iterator[StageResult]:
    """The result of each stage; `first` numbers the graph's first among all of them."""
    known = [workplace.load(first + i, own.rules) if workplace else None for i, own in enumerate(layers)]
    finished = known.index(None) if None in known else len(known)
    reached = replay.skip_to(min(finished, len(known) - 1))
    for position, own in enumerate(layers):
        number, result = first + position, known[position]
        if result is not None:
            apply_folds(generator, result.smooth)
        else:
            with threadpool_limits(1, "blas"):
                result = solve_stage(generator, replay, own)
            if workplace:
                workplace.save(number, result)
        if reached <= position < len(layers) - 1:
            _advance(replay, own, result)
        yield result


@torch.no_grad()
def _advance(replay: Replay, layers: StageLayers, result: StageResult) -> None:
    """Run the stage as it will be: rounded weights, quantised inputs. The weights are put back afterwards."""
    originals = {layer: weight.clone() for layer, weight in layers.weights.items()}

    def tap(layer: str, x: Tensor, window: Window | None, step: int | None) -> Tensor:
        activation = result.activations[layer]
        scale = None
        if isinstance(activation.spec.scales, PerStep) and activation.scale is not None:
            scale = torch.from_numpy(activation.scale)[step]
        return fake_quantise(x, activation, scale)

    def after(layer: str, y: Tensor) -> Tensor:
        return fake_quantise(y, result.outputs[layer]) if layer in result.outputs else y

    try:
        for layer, rule in layers.rules.items():
            weight = layers.weights[layer]
            weight.copy_(torch.from_numpy(_solved(layer, rule, weight, result).dequantize()).reshape(weight.shape))
        replay.advance({layer: layers.weights[layer] for layer in result.activations}, tap, after)
    finally:
        for layer, original in originals.items():
            layers.weights[layer].copy_(original)


def _solved(layer: str, rule: Rule, weight: Tensor, result: StageResult) -> QuantizedTensor:
    if layer in result.weights:
        return result.weights[layer]
    assert rule.weight is not None  # a rule that is assigned to a layer quantises it
    return get_algorithm(rule.algorithm)(matrix_of(weight), rule.weight, name=layer)


def _require_folds(generator: Generator, rules: Mapping[str, Rule], recipe: Recipe) -> None:
    foldable = {layer for fold in generator.folds for layer in fold.layers}
    for number, rule in enumerate(recipe.rules, start=1):
        covered = [layer for layer, own in rules.items() if own is rule]
        if rule.smooth and not foldable.intersection(covered):
            raise InputError(
                f"recipe {recipe.name!r}, rule {number}: {rule.layers!r} has no layer before which {rule.smooth} could "
                "be folded in; leave smooth out there"
            )
