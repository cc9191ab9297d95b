"""Rates: what settings say, or the error of quantisation by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qexport.distill import Distillation, DistillSettings, Samples, distill
from qexport.distill.data import drawn_tokens
from qexport.distill.rates import groups, rates_of
from qexport.distill.run import make_task
from qexport.distill.student import Student, layer_parameters
from qexport.distill.tasks import DenoiseTask, TokenTask
from qexport.family import Generator
from qexport.recipe import Recipe, recipe_for
from qexport.scheme import preset
from qexport.solution import Solution
from qexport.solve import solve

SHARE = TokenTask.error_share
AUTO = DistillSettings(Distillation("forward"))
GIVEN = DistillSettings(Distillation("forward"), lr=0.01, scale_lr=0.002, rest_lr=0.003)


def student_of(generator: Generator, recipe: Recipe, solution: Solution | None = None) -> Student:
    task = make_task(generator, AUTO)
    return Student(generator, recipe, solution or Solution(), task.predictor, task.place_steps)


def searched(generator: Generator, wbits: int) -> Recipe:
    return recipe_for(preset(wbits), generator.default_layers, f"w{wbits}", "mse")


def rms(tensor: torch.Tensor) -> float:
    return float(np.sqrt(np.mean(tensor.detach().numpy().astype(np.float64) ** 2)))


def test_errors_are_what_quantisation_changed(tiny: Generator) -> None:
    recipe = recipe_for(preset(3), tiny.default_layers, "w3", "gptq")
    solution = solve(copy.deepcopy(tiny), recipe)
    student = student_of(tiny, recipe, solution)
    originals = layer_parameters(tiny, student.layers)
    for layer, codes in solution.weights.items():
        w = originals[layer].detach().numpy().astype(np.float64)
        by_hand = np.linalg.norm(codes.dequantize() - w) / np.linalg.norm(w)
        assert student.errors[layer] == pytest.approx(by_hand, rel=1e-5)
        assert 0.05 < by_hand < 0.4
    assert set(student.errors) == set(solution.weights)


def test_a_matrix_of_zeros_has_no_error_and_does_not_move(tiny: Generator, tiny_w2: Recipe) -> None:
    empty = copy.deepcopy(tiny)
    layer = student_of(tiny, tiny_w2).layers[0]
    with torch.no_grad():
        layer_parameters(empty, (layer,))[layer].zero_()
    assert student_of(empty, tiny_w2).errors[layer] == 0.0


def test_what_is_not_given_follows_from_the_errors() -> None:
    errors = {"a": 0.1, "b": 0.3}
    found = rates_of(errors, AUTO, 0.017)
    assert found.weights == found.scales == pytest.approx({"a": 0.0017, "b": 0.0051})
    assert found.rest == pytest.approx(0.7 * 0.0034)
    given = rates_of(errors, GIVEN, 0.017)
    assert (given.weights, given.scales, given.rest) == ({"a": 0.01, "b": 0.01}, {"a": 0.002, "b": 0.002}, 0.003)
    assert given.to_json() == {"lr": 0.01, "scale_lr": 0.002, "rest_lr": 0.003}
    mixed = rates_of(errors, DistillSettings(lr=0.01, rest_lr=0.0), 0.017)
    assert mixed.weights == {"a": 0.01, "b": 0.01}
    assert mixed.scales == pytest.approx({"a": 0.0017, "b": 0.0051})
    assert mixed.rest == 0.0


def test_finer_codes_move_by_less(tiny: Generator) -> None:
    rates = [rates_of(student_of(tiny, searched(tiny, wbits)).errors, AUTO, SHARE).mean for wbits in (2, 3, 4, 8)]
    assert all(coarse / fine > 1.5 for coarse, fine in pairwise(rates)), rates


@pytest.mark.parametrize("settings", [AUTO, GIVEN])
def test_every_trained_tensor_has_its_own_rate(
    tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples, settings: DistillSettings
) -> None:
    student = student_of(tiny, tiny_w2)
    student.train_rest(*next(tiny_tokens.batches(1)))
    rates = rates_of(student.errors, settings, SHARE)
    found = {id(group["params"][0]): group["lr"] for group in groups(student, rates)}
    assert set(found) == {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    for layer, latent, scale in zip(student.layers, student.latents, student.scales, strict=True):
        assert found[id(latent)] == pytest.approx(rates.weights[layer] * rms(latent), rel=1e-5)
        assert found[id(scale)] == pytest.approx(rates.scales[layer] * rms(scale), rel=1e-5)
    for tensor in student.rest:
        assert found[id(tensor)] == pytest.approx(rates.rest * rms(tensor), rel=1e-5)


def test_scales_that_are_held_have_none(tiny: Generator, tiny_w2: Recipe) -> None:
    task = make_task(tiny, AUTO)
    student = Student(tiny, tiny_w2, Solution(), task.predictor, task.place_steps, learn_scales=False)
    assert len(groups(student, rates_of(student.errors, AUTO, SHARE))) == len(student.layers)


@pytest.mark.parametrize("wbits", [2, 4])
def test_rates_that_nobody_gave_serve_every_width(tiny: Generator, wbits: int) -> None:
    """A tenth and ten times of them get less far on held-out samples."""
    recipe, data = searched(tiny, wbits), drawn_tokens(tiny, 48, 0)
    base = DistillSettings(Distillation("forward"), steps=24, batch=8, samples=48, held_out=16, evaluate_every=24)
    errors = student_of(tiny, recipe).errors
    auto = rates_of(errors, base, SHARE).to_json()

    def judged(settings: DistillSettings) -> float:
        return distill(tiny, recipe, Solution(), settings, data=data).report["judged"][-1][1]

    def times(factor: float) -> DistillSettings:
        values = {name: factor * value for name, value in auto.items()}
        return DistillSettings(**{**base.__dict__, **values})

    report = distill(tiny, recipe, Solution(), base, data=data).report
    assert report["rates"] == auto
    assert report["judged"][-1][1] < 0.9 * report["start"]
    assert report["judged"][-1][1] < min(judged(times(0.1)), judged(times(10.0)))


def test_a_denoiser_moves_by_less(dit: Generator) -> None:
    """By 0.007 of the error; 0.017 undid more than it mended."""
    recipe = searched(dit, 4)
    settings = DistillSettings(steps=2, batch=2, samples=4, held_out=2, evaluate_every=2)
    task = make_task(dit, settings)
    assert isinstance(task, DenoiseTask)
    student = Student(dit, recipe, Solution(), task.predictor, task.place_steps)
    mean = float(np.mean(list(student.errors.values())))
    found = distill(dit, recipe, Solution(), settings, data=None).report["rates"]
    assert found["lr"] == found["scale_lr"] == pytest.approx(0.007 * mean)
    assert found["rest_lr"] == pytest.approx(0.7 * 0.007 * mean)


@pytest.mark.parametrize(("settings", "again"), [(AUTO, True), (GIVEN, False)])
def test_other_constants_are_another_run(
    tiny: Generator,
    tiny_w2: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: DistillSettings,
    again: bool,
) -> None:
    """A run that is cut off does not go on at rates that follow from another constant; given rates ask for none."""
    short = replace(settings, steps=2, batch=4, samples=12, held_out=4, evaluate_every=2)
    data = drawn_tokens(tiny, 12, 0)
    first = distill(tiny, tiny_w2, Solution(), short, data=data, work=tmp_path).report
    assert distill(tiny, tiny_w2, Solution(), short, data=data, work=tmp_path).report["resumed_after"] == 2
    monkeypatch.setattr(TokenTask, "error_share", 2 * SHARE)
    other = distill(tiny, tiny_w2, Solution(), short, data=data, work=tmp_path).report
    assert (other["resumed_after"] == 0) == again
    assert (other["rates"] != first["rates"]) == again
