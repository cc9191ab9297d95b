"""Folding a factor into a model changes nothing but the layers' inputs: exact algebra, held to float32's rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from qexport_models.dit.folds import STEPS
from tiny_models import tiny_llamagen, tiny_shared_aln
from torch import Tensor

from qexport.errors import InputError
from qexport.family import Generator
from qexport.pipeline import load_generator
from qexport.recipe import Calibration, Recipe, Rule
from qexport.reference import Interception, apply_fold, apply_folds, layer_weights, torch_player
from qexport.runtime import CallRecord
from qexport.scheme import preset
from qexport.solve import solve

SAME = 1e-6
"""Greatest relative L2 of any output of any call, between the folded model and the plain one, both in float64: VAR
measures 4e-15; DiT and LlamaGen, which compute their last steps in float32 whatever they are given, nothing at all."""

SAME_FLOAT32 = 3e-6
"""The same with everything in float32. Folding rounds every weight it touches once more (6e-8), as often as the
checkpoint did: the plain models in float32 are 0.7e-6 to 1.3e-6 from themselves in float64, and the folded ones measure
0.4e-6 to 1.3e-6 from the plain ones."""

BROKEN = 30 * SAME_FLOAT32
"""A fold with a mistake in it must be off by at least this."""


MODELS: dict[str, tuple[Callable[[], Generator], int]] = {
    "var-c10-d2": (lambda: load_generator("var-c10-d2"), 7),
    "var-shared": (tiny_shared_aln, 3),
    "dit-c10-d2": (lambda: load_generator("dit-c10-d2"), 7),
    "llamagen-tiny": (tiny_llamagen, 9),
}
"""Each with how many places it has: three a block and one at the end; one a block; four a layer."""


pytestmark = pytest.mark.usefixtures("one_thread")


def _calls(generator: Generator) -> list[CallRecord[Tensor]]:
    """The calls of one short trajectory of two images."""
    player, records = torch_player(generator), []
    if generator.plan.schedules:
        player = player.with_schedule("ddim-10")
    outputs = {graph.name: [port.name for port in graph.outputs] for graph in generator.graphs}
    player.play({"label": np.array([1, 7])}, seed=3, observer=records.append, extra_outputs=outputs)
    return records


def _error(generator: Generator, records: list[CallRecord[Tensor]]) -> float:
    """Greatest relative L2 over calls and floating-point outputs, each call fed what was recorded.

    Except for caches: their values have divided channels in a folded model, so it is given its own.
    """
    player, worst, caches = torch_player(generator), 0.0, {}
    for record in records[:-1]:  # the last is the decoder, which has no folds
        outputs = tuple(name for name, value in record.results.items() if value.is_floating_point())
        results = player.backend.run(record.graph, {**record.feeds, **caches}, outputs)
        caches = {f"past_{name}": value for name, value in results.items() if f"past_{name}" in record.feeds}
        for name in outputs:
            if f"past_{name}" in record.feeds:
                continue
            want = record.results[name].double()
            worst = max(worst, float((results[name].double() - want).norm() / want.norm()))
    return worst


def _factors(generator: Generator, seed: int = 0) -> dict[str, np.ndarray]:
    """From a quarter to four, as smoothing chooses them."""
    random, weights = np.random.default_rng(seed), layer_weights(generator)
    widths = {fold.name: weights[fold.layers[0]].shape[1] for fold in generator.folds}
    return {name: np.exp2(random.uniform(-2, 2, width)).astype(np.float32) for name, width in widths.items()}


def _to_float64(generator: Generator, records: list[CallRecord[Tensor]]) -> list[CallRecord[Tensor]]:
    """Turns the modules to float64, and computes the recorded calls again in it."""
    for graph in generator.graphs:
        graph.module.double()
    backend, caches, again = torch_player(generator).backend, {}, []
    for record in records:
        feeds = {name: value.double() if value.is_floating_point() else value for name, value in record.feeds.items()}
        feeds |= caches
        results = dict(backend.run(record.graph, feeds, tuple(record.results)))
        caches = {f"past_{name}": value for name, value in results.items() if f"past_{name}" in feeds}
        again.append(replace(record, feeds=feeds, results=results))
    return again


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "limit"), [("float64", SAME), ("float32", SAME_FLOAT32)])
def test_folding_leaves_the_model_as_it_was(model: str, dtype: str, limit: float) -> None:
    build, places = MODELS[model]
    generator = build()
    records = _calls(generator)
    if dtype == "float64":
        records = _to_float64(generator, records)
    assert len(generator.folds) == places
    apply_folds(generator, _factors(generator))
    assert _error(generator, records) < limit


@pytest.mark.parametrize("model", ["var-c10-d2", "dit-c10-d2"])
@pytest.mark.parametrize("smooth", ["smoothquant", "awq"])
def test_the_factors_that_smoothing_finds_leave_the_model_as_it_was(model: str, smooth: str) -> None:
    """Not drawn ones: calibrated, in float64 to 1e-6 and in float32 to what its rounding allows."""
    scheme = preset(8, 8) if smooth == "smoothquant" else preset(4)
    plain = load_generator(model)
    rules = tuple(Rule(layers, scheme.weight, "rtn", smooth, scheme.activation) for layers in plain.default_layers)
    schedule = "ddim-10" if plain.plan.schedules else None
    factors = solve(plain, Recipe("folds", rules, calibration=Calibration(4, schedule=schedule))).smooth
    assert factors
    assert max(float(np.abs(np.log2(factor)).max()) for factor in factors.values()) > 0.25  # they do something
    for dtype, limit in (("float64", SAME), ("float32", SAME_FLOAT32)):
        generator = load_generator(model)
        records = _calls(generator)
        if dtype == "float64":
            records = _to_float64(generator, records)
        apply_folds(generator, factors)
        assert _error(generator, records) < limit, dtype


@pytest.mark.parametrize("model", MODELS)
def test_the_inputs_are_what_was_promised(model: str) -> None:
    """Every layer of a fold sees x / factor, and a layer of none sees x."""
    generator = MODELS[model][0]()
    record = _calls(generator)[0]  # the caches are still empty
    weights = layer_weights(generator)

    def inputs() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def visit(name: str, x: Tensor, window: object) -> Tensor:
            seen[name] = x
            return x

        with Interception({name: weights[name] for name in generator.layers}, visit):
            torch_player(generator).backend.run(record.graph, record.feeds, ())
        return seen

    before, factors = inputs(), _factors(generator)
    apply_folds(generator, factors)
    after = inputs()
    want = dict(before)
    for fold in generator.folds:
        want |= {layer: before[layer] / torch.from_numpy(factors[fold.name]) for layer in fold.layers}
    for layer, x in want.items():
        assert (after[layer] - x).norm() <= SAME_FLOAT32 * x.norm(), layer  # the first map is all zeros


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mistake", ["an absorber forgotten", "no offset", "the wrong rows", "a layer forgotten"])
def test_a_fold_with_a_mistake_changes_the_model(model: str, mistake: str) -> None:
    generator = MODELS[model][0]()
    records = _calls(generator)
    factors = _factors(generator)
    hit = 0
    for fold in generator.folds:
        absorbers = fold.absorbers
        broken = {
            "an absorber forgotten": replace(fold, absorbers=absorbers[:-1]),
            "no offset": replace(fold, absorbers=tuple(replace(a, offset=0.0) for a in absorbers)),
            "the wrong rows": replace(
                fold, absorbers=tuple(replace(a, first=0, last=a.last - a.first) for a in absorbers)
            ),
            "a layer forgotten": replace(fold, layers=fold.layers[:-1] or fold.layers),
        }[mistake]
        hit += broken != fold
        apply_fold(generator, broken, factors[fold.name])
    if hit:
        assert _error(generator, records) > BROKEN
    else:
        assert (model, mistake) in {
            ("llamagen-tiny", "no offset"),
            *((name, "a layer forgotten") for name in MODELS if name != "llamagen-tiny"),
        }


def test_where_one_modulation_serves_all_blocks_it_is_left_alone() -> None:
    generator = tiny_shared_aln()
    assert {fold.name for fold in generator.folds} == {"blocks.0.proj", "blocks.1.proj", "head"}


def test_factors_that_do_not_fit_are_refused() -> None:
    generator = tiny_llamagen()
    fold = generator.folds[0]
    for factor, message in (
        (np.ones(3, np.float32), "fits"),
        (np.ones(64).view(np.float32), "fits"),
        (np.full(64, -1, np.float32), "positive"),
        (np.full(64, np.nan, np.float32), "positive"),
    ):
        with pytest.raises(InputError, match=message):
            apply_fold(generator, fold, factor)
    with pytest.raises(InputError, match=r"no place 'layers\.9'"):
        apply_folds(generator, {"layers.9": np.ones(64, np.float32)})


def test_steps_of_a_dit_are_hundreds_of_timesteps() -> None:
    generator = load_generator("dit-c10-d2")
    assert generator.steps is not None
    assert generator.steps.count == STEPS
    # DDIM in 25 steps keeps every 40th timestep from 0, noisiest first (arXiv:2010.02502; hand-computed).
    want = [math.floor(t / 100) for t in range(960, -1, -40)]
    assert generator.steps.index["schedule.ddim-25"].tolist() == want
    for name, index in generator.steps.index.items():
        assert set(index.tolist()) == set(range(STEPS)), name
        assert len(index) == generator.plan.tables[name].shape[0]


def test_steps_of_a_var_are_its_scales() -> None:
    generator = load_generator("var-c10-d2")
    assert generator.steps is not None
    assert (generator.steps.graph, generator.steps.count) == ("step", 7)
    assert generator.steps.count == generator.plan.calls[0].iterations
