"""The least memory of a run, against counts by hand, and never more than what is measured later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qexport.distill import Distillation, DistillSettings
from qexport.distill import least as least_module
from qexport.distill.data import Samples
from qexport.distill.least import least_bytes
from qexport.distill.memory import estimate_bytes
from qexport.distill.run import make_task
from qexport.distill.student import Student
from qexport.family import Generator
from qexport.recipe import Recipe, recipe_for
from qexport.scheme import preset
from qexport.solution import Solution

ONE = DistillSettings(Distillation("forward"), batch=2)
TOKENS, CODES, WIDTH, BLOCKS = 14, 64, 64, 2  # of the tiny VAR


def weights_of(generator: Generator) -> int:
    return sum(value.numel() * value.element_size() for g in generator.graphs for value in g.parameters().values())


def test_by_hand(tiny: Generator) -> None:
    held = weights_of(tiny)
    sample = 4 * TOKENS * CODES + (BLOCKS - 1) * TOKENS * WIDTH
    assert least_bytes(tiny, ONE) == held + 2 * 4 * sample
    assert least_bytes(tiny, replace(ONE, batch=200)) == held + 200 * 4 * sample
    assert least_bytes(tiny, replace(ONE, batch=200), 2) == held + 100 * 4 * sample  # each has its share
    assert least_bytes(tiny, replace(ONE, bf16=True)) == held + 2 * 2 * sample
    assert least_bytes(tiny, ONE, device="cuda") == 2 * held + 2 * 4 * sample  # the teacher is copied there too
    # A trained number: rounded, gradient, two moments of 4 bytes, two bytes of codes.
    assert least_bytes(tiny, ONE, 1, 1000) == held + 1000 * 18 + 2 * 4 * sample
    assert least_bytes(tiny, replace(ONE, offload=True), 1, 1000) == held + 1000 * 10 + 2 * 4 * sample
    assert least_bytes(tiny, replace(ONE, ema=0.5), 1, 1000) == held + 1000 * 22 + 2 * 4 * sample
    # Of two processes each keeps half of itself, gradient and moments.
    assert least_bytes(tiny, replace(ONE, sharded=True), 2, 1000) == held - 2000 + 1000 * 6 + 6000 + 4 * sample


def test_of_a_denoiser(dit: Generator) -> None:
    """dit-c10-d2: 8 × 16 × 16 numbers of output, 64 tokens of width 128 into each block."""
    assert least_bytes(dit, ONE) == weights_of(dit) + 2 * 4 * (4 * 8 * 16 * 16 + 64 * 128)


@pytest.mark.parametrize(
    "changed",
    [{}, {"batch": 6400}, {"recompute": True, "batch": 6400}, {"bf16": True}, {"ema": 0.5}, {"offload": True},
     {"scale_lr": 0.0}, {"bf16": True, "recompute": True, "batch": 6400}, {"batch": 64, "sharded": True}],
)  # fmt: skip
def test_it_is_never_more_than_what_is_measured(
    tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples, changed: dict
) -> None:
    settings = replace(ONE, **changed)
    task = make_task(tiny, settings)
    student = Student(
        tiny, tiny_w2, Solution(), task.predictor, task.place_steps, learn_scales=settings.learn_scales,
        learn_activation_scales=False,
    )  # fmt: skip
    trained = sum(latent.numel() for latent in student.latents)
    count = 2 if settings.sharded else 1
    measured = weights_of(tiny) + estimate_bytes(student, next(tiny_tokens.batches(1)), settings, count)
    assert 0.05 * measured < least_bytes(tiny, settings, count, trained) < measured


def test_of_a_denoiser_it_is_never_more_either(dit: Generator) -> None:
    settings = replace(ONE, batch=64, recompute=True)
    task = make_task(dit, settings)
    recipe = recipe_for(preset(2), dit.default_layers, "w2", "rtn")
    student = Student(dit, recipe, Solution(), task.predictor, task.place_steps)
    trained = sum(latent.numel() for latent in student.latents)
    sample = (torch.randn(1, 4, 16, 16), torch.tensor([40]), torch.tensor([1]))
    measured = weights_of(dit) + estimate_bytes(student, sample, settings)
    assert 0.3 * measured < least_bytes(dit, settings, 1, trained) < measured


@pytest.mark.parametrize(("name", "wrong"), [("OUTPUTS", 5), ("_FLOAT", 8), ("_BFLOAT", 4)])
def test_mutation_what_is_counted_wrongly_is_noticed(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch, name: str, wrong: int
) -> None:
    monkeypatch.setattr(least_module, name, wrong)
    with pytest.raises(AssertionError):
        test_by_hand(tiny)
