"""The running mean is what is judged and returned, not the weights of the last step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qexport.distill import Distillation, DistillSettings, Samples
from qexport.distill.student import Student
from qexport.distill.tasks import TokenTask
from qexport.distill.trainer import Trainer
from qexport.family import Generator
from qexport.numerics.affine import quantize_full
from qexport.recipe import Recipe
from qexport.solution import Solution

DECAY = 0.75

FLIPPED = 1e-3
"""Share of codes that may differ: float32 and float64 means differ by 1e-7, which moves one number in 10⁶ or so across
the border of its code, and a scale across that of an fp16 number now and then."""


def test_what_is_returned_is_the_mean_worked_out_by_hand(
    tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mean ← 0.75 · mean + 0.25 · value after each of three steps, in float64, from the untrained start."""
    settings = DistillSettings(
        Distillation("forward"), steps=3, batch=4, lr=0.1, ema=DECAY, samples=12, held_out=4, evaluate_every=3
    )
    task = TokenTask(tiny, settings.loss)
    figures = iter([2.0, 1.0])  # the last judgement is the best
    monkeypatch.setattr(task, "judge", lambda *given: torch.tensor([next(figures), 1.0], dtype=torch.float64))
    student = Student(tiny, tiny_w2, Solution(), task.predictor, task.place_steps)
    trainer = Trainer(student, task.predictor(tiny), task, tiny_tokens.split(4), settings)

    def values() -> list[np.ndarray]:
        return [tensor.detach().double().numpy().copy() for tensor in (*student.latents, *student.scales)]

    means = values()

    def follow(*told: object) -> None:
        for mean, value in zip(means, values(), strict=True):
            mean *= DECAY
            mean += (1 - DECAY) * value

    trained = trainer.run(follow)
    assert trained.history.best == (3, 1.0)
    count = len(student.layers)
    wrong = live = total = 0
    for i, (layer, spec) in enumerate(zip(student.layers, student.specs, strict=True)):
        found = trained.best.weights[layer]
        by_hand = quantize_full(means[i].astype(np.float32), means[count + i].astype(np.float16), spec, name=layer)
        last = quantize_full(
            student.latents[i].detach().numpy(), student.scales[i].detach().numpy().astype(np.float16), spec, name=layer
        )
        wrong += int((found.codes != by_hand).sum())
        live += int((found.codes != last).sum())
        total += found.codes.size
    assert wrong <= FLIPPED * total
    assert live > 10 * FLIPPED * total  # mutation: the weights of the last step, which is what no average would return
