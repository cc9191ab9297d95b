"""The memory that a run is said to take, against counts by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from qexport.distill import Distillation, DistillSettings, Samples, memory
from qexport.distill.memory import available_bytes, estimate_bytes, require_memory, saved_bytes
from qexport.distill.student import Student
from qexport.distill.tasks import TokenTask
from qexport.errors import InputError
from qexport.family import Generator
from qexport.recipe import Recipe
from qexport.solution import Solution

ONE = DistillSettings(Distillation("forward"), batch=1)
MARGIN = 1.1


def test_saved_bytes_of_a_layer_by_hand() -> None:
    """A linear layer keeps its input (5 × 7 floats) for its weight's gradient, ReLU its result (5 × 3)."""
    layer, x = nn.Linear(7, 3), torch.randn(5, 7)
    kept, output = saved_bytes(lambda: torch.relu(layer(x)))
    assert kept == 4 * (5 * 7 + 5 * 3)
    assert output == 4 * 5 * 3
    assert saved_bytes(lambda: torch.relu(layer(x)), lambda: [x])[0] == 4 * 5 * 3


def test_estimate_by_hand() -> None:
    """64 × 64 weights: rounded, gradient, two moments, two bytes of codes; a sample: its input, four outputs."""
    layer, sample = nn.Linear(64, 64, bias=False), (torch.randn(9, 64)[:1],)
    weights, per_sample = 64 * 64, 5 * 64 * 4

    def by_hand(numbers: float, parts: int, samples: int) -> int:
        return int(MARGIN * (weights * (4 + 2) + int(weights * 4 * numbers) // parts + samples * per_sample))

    cases = [
        (by_hand(3, 1, 1), ONE, 1),
        (by_hand(3, 1, 1000), replace(ONE, batch=1000), 1),
        (by_hand(3, 1, 500), replace(ONE, batch=1000), 2),  # each process has its share of a batch
        (by_hand(4, 1, 1), replace(ONE, ema=0.5), 1),
        (by_hand(1, 1, 1), replace(ONE, offload=True), 1),
        (by_hand(3, 2, 1), replace(ONE, batch=2, sharded=True), 2),
    ]
    for expected, settings, processes in cases:
        assert estimate_bytes(layer, sample, settings, processes) == expected
    judged = estimate_bytes(layer, sample, ONE, held_out=64)
    assert judged == int(MARGIN * (weights * (4 + 2 + 12) + 16 * 2 * 64 * 4))  # more than one sample of training


@pytest.mark.parametrize(("name", "wrong"), [("_MOMENTS", 0), ("_GRADIENT", 0), ("_CODES", 0), ("OUTPUTS", 3)])
def test_mutation_what_is_forgotten_is_noticed(name: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, name, wrong)
    with pytest.raises(AssertionError):
        test_estimate_by_hand()


@pytest.fixture(scope="module")
def student(tiny: Generator, tiny_w2: Recipe) -> Student:
    task = TokenTask(tiny, Distillation("forward"))
    return Student(tiny, tiny_w2, Solution(), task.predictor, task.place_steps)


def test_settings_that_save_memory_are_counted(
    student: Student, tiny_tokens: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two blocks one is computed again: of its activations only the input is kept. bf16 keeps less."""
    sample = next(tiny_tokens.batches(1))

    def of_a_sample(settings: DistillSettings) -> int:
        small, large = (estimate_bytes(student, sample, replace(settings, batch=n)) for n in (100, 200))
        return large - small

    plain, recomputed = of_a_sample(ONE), of_a_sample(replace(ONE, recompute=True))
    assert 0.4 * plain < recomputed < 0.8 * plain
    assert of_a_sample(replace(ONE, bf16=True)) < plain
    assert "forward" not in vars(student.generator.quality.var.blocks[1])  # type: ignore[union-attr]
    monkeypatch.setattr("qexport.distill.recompute.recomputed", lambda modules, again: nullcontext([modules]))
    assert of_a_sample(replace(ONE, recompute=True)) == plain  # mutation: blocks that keep all


def test_rounded_weights_are_counted_once(
    student: Student, tiny_tokens: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: counted among the activations too. Those of adaLN are not kept: no gradient goes into the class."""
    sample = next(tiny_tokens.batches(1))
    right = estimate_bytes(student, sample, ONE)
    sizes = zip(student.layers, (latent.numel() for latent in student.latents), strict=True)
    kept = sum(size for layer, size in sizes if "ada_lin" not in layer)
    monkeypatch.setattr(Student, "rounded", [])
    assert estimate_bytes(student, sample, ONE) - right == pytest.approx(MARGIN * 4 * kept, rel=0.01)


def test_what_would_take_less_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    require_memory(5 * 10**8, ONE, 2)
    with pytest.raises(
        InputError,
        match=r"about 2\.0 GB, 1\.0 GB are free; .*--batch\), or --train recompute, or .*or --train rest_lr=0$",
    ):
        require_memory(2 * 10**9, ONE)
    with pytest.raises(InputError, match=r"0\.6 GB in each of 2 processes.*\(--batch\)$"):
        require_memory(6 * 10**8, replace(ONE, batch=2, recompute=True, sharded=True, rest_lr=0.0), 2)
    with pytest.raises(InputError, match=r"\(--batch\), or --train recompute$"):
        require_memory(2 * 10**9, replace(ONE, offload=True, rest_lr=0.0))
    with pytest.raises(InputError, match=r"needs at least 2\.0 GB, 1\.0 GB are free; .*--batch\), or --train offload$"):
        require_memory(2 * 10**9, ONE, least=True)  # what recompute saves is not counted there


def test_available_memory_is_that_of_this_machine() -> None:
    found = available_bytes()
    assert found is None or 1 << 24 < found < 1 << 50
