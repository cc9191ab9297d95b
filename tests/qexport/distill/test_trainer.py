"""Training: it helps, it is repeatable, and being killed changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qexport.distill import Distillation, Distilled, DistillSettings, Samples, distill
from qexport.distill import checkpoints as checkpoints_module
from qexport.distill import trainer as trainer_module
from qexport.distill.data import drawn_tokens
from qexport.distill.student import Student
from qexport.distill.tasks import TokenTask
from qexport.distill.trainer import Trainer
from qexport.errors import InputError
from qexport.family import Generator
from qexport.recipe import Recipe
from qexport.solution import Solution

SETTINGS = DistillSettings(
    Distillation("split", top_k=900),
    steps=6,
    batch=16,
    lr=0.02,
    rest_lr=0.0,
    samples=48,
    held_out=16,
    evaluate_every=2,
    checkpoint_every=2,
)


@pytest.fixture(scope="module")
def drawn(tiny: Generator) -> Samples:
    return drawn_tokens(tiny, 48, 0)


@pytest.fixture(scope="module")
def plain(tiny: Generator, tiny_w2: Recipe, drawn: Samples) -> Distilled:
    return distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)


def same(one: Distilled, other: Distilled) -> bool:
    """Codes, scales and the course of the loss, to the bit."""
    weights = [found.solution.weights for found in (one, other)]
    return one.report["losses"] == other.report["losses"] and all(
        np.array_equal(weight.codes, weights[1][layer].codes)
        and weight.scales.tobytes() == weights[1][layer].scales.tobytes()
        for layer, weight in weights[0].items()
    )


def test_training_helps_where_it_is_held_out(plain: Distilled) -> None:
    """KL falls by a third and more within six steps of sixteen images."""
    assert plain.report["judged"][0][1] == plain.report["start"]
    assert plain.report["best"] < 0.7 * plain.report["start"]
    assert plain.report["steps"] == 6
    assert plain.report["figure"] == "kl"
    assert len(plain.solution.weights) == 10


def test_mutation_without_updates_does_not_help(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    found = distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)
    with pytest.raises(AssertionError):
        test_training_helps_where_it_is_held_out(found)


class KilledError(Exception):
    """What the tests end a run with."""


@pytest.mark.parametrize("average", [0.0, 0.5])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_killed_and_resumed_is_as_if_not_killed(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path, plain: Distilled, at: int, average: float
) -> None:
    settings = replace(SETTINGS, ema=average)
    whole = plain if not average else distill(tiny, tiny_w2, Solution(), settings, data=drawn)

    def kill(step: int, steps: int, loss: float, held: float) -> None:
        if step == at:
            raise KilledError

    with pytest.raises(KilledError):
        distill(tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path, progress=kill)
    steps: list[int] = []
    resumed = distill(
        tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path, progress=lambda step, *rest: steps.append(step)
    )
    assert steps[0] == at // 2 * 2 + 1  # from the last even step, not from the start
    assert same(whole, resumed)
    again = distill(tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path)  # finished: nothing is left to do
    assert same(whole, again)


def test_mutation_a_forgotten_optimiser_is_noticed(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path, plain: Distilled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        test_killed_and_resumed_is_as_if_not_killed(tiny, tiny_w2, drawn, tmp_path, plain, 3, 0.0)


def test_other_settings_do_not_go_on_from_here(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path
) -> None:
    short = replace(SETTINGS, steps=1)
    distill(tiny, tiny_w2, Solution(), short, data=drawn, work=tmp_path)
    distill(tiny, tiny_w2, Solution(), replace(short, seed=1), data=drawn, work=tmp_path)
    distill(tiny, tiny_w2, Solution(), short, data=drawn, work=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_drawn_samples_are_kept_for_the_next_try(tiny: Generator, tiny_w2: Recipe, tmp_path: Path) -> None:
    told: list[int] = []
    short = replace(SETTINGS, steps=1)
    distill(tiny, tiny_w2, Solution(), short, work=tmp_path, drawing=lambda done, total: told.append(done))
    assert told == [32, 48]
    distill(tiny, tiny_w2, Solution(), short, work=tmp_path, drawing=lambda done, total: told.append(done))
    assert told == [32, 48]


def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_checkpoint(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_loss, calls = TokenTask.loss, []

    def sick(self, teacher, student, batch):
        calls.append(1)
        return true_loss(self, teacher, student, batch) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(TokenTask, "loss", sick)
    with pytest.raises(InputError, match=r"^distillation: the loss is nan at step 4; lower the rate.*checkpoint is in"):
        distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn, work=tmp_path)
    state = torch.load(next(tmp_path.iterdir()) / trainer_module.CHECKPOINT, weights_only=True)
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["student"].values())


def test_a_damaged_checkpoint_is_said(tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path) -> None:
    short = replace(SETTINGS, steps=1)
    distill(tiny, tiny_w2, Solution(), short, data=drawn, work=tmp_path)
    file = next(tmp_path.iterdir()) / trainer_module.CHECKPOINT
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"training\.pt: damaged \(.*\); delete it"):
        distill(tiny, tiny_w2, Solution(), short, data=drawn, work=tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoints_module.Checkpoints(tmp_path, "run")
    kept.save("x.pt", {"step": 1})

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="cannot be written"):
        kept.save("x.pt", {"step": 2})
    assert kept.load("x.pt") == {"step": 1}
    assert [path.name for path in kept.folder.iterdir()] == ["x.pt"]


def test_early_stop_and_best_of_all(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure rises after the second judgement: training stops two judgements later, with that best one."""
    figures = iter([0.5, 0.2, 0.3, 0.4, 0.1, 0.05])
    settings = replace(SETTINGS, steps=20, evaluate_every=1, patience=2, loss=Distillation("forward"))
    task = TokenTask(tiny, settings.loss)
    student = Student(tiny, tiny_w2, Solution(), task.predictor, task.place_steps)
    trainer = Trainer(student, task.predictor(tiny), task, drawn.split(16), settings)
    codes: list[np.ndarray] = []

    def judge() -> None:
        trainer.history.judged.append((trainer._step, next(figures)))
        codes.append(student.finish().weights["blocks.0.ffn.fc1"].codes)
        if trainer.history.best[0] == trainer._step:
            trainer._best = student.finish()

    monkeypatch.setattr(trainer, "_judge", judge)
    trained = trainer.run()
    assert [step for step, _ in trained.history.judged] == [0, 1, 2, 3]
    assert trained.history.best == (1, 0.2)
    np.testing.assert_array_equal(trained.best.weights["blocks.0.ffn.fc1"].codes, codes[1])
    assert not np.array_equal(codes[1], codes[3])


def test_recomputing_blocks_changes_nothing_but_memory(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, plain: Distilled
) -> None:
    found = distill(tiny, tiny_w2, Solution(), replace(SETTINGS, recompute=True), data=drawn)
    assert same(plain, found)
    block = tiny.quality.var.blocks[0]  # type: ignore[union-attr]
    assert "forward" not in vars(block)


def test_bfloat16_stays_near(tiny: Generator, tiny_w2: Recipe, drawn: Samples, plain: Distilled) -> None:
    found = distill(tiny, tiny_w2, Solution(), replace(SETTINGS, bf16=True), data=drawn)
    assert found.report["best"] < 0.7 * found.report["start"]
    assert found.report["losses"] != plain.report["losses"]
    np.testing.assert_allclose(found.report["losses"], plain.report["losses"], rtol=0.2)


@pytest.mark.parametrize("loss", ["forward", "reverse", "js", "logit-mse", "cross-entropy", "mixed", "boosted"])
def test_every_loss_trains(tiny: Generator, tiny_w2: Recipe, drawn: Samples, loss: str) -> None:
    found = distill(tiny, tiny_w2, Solution(), replace(SETTINGS, loss=Distillation(loss)), data=drawn)
    assert found.report["best"] < found.report["start"]


def test_a_denoiser_trains_on_squared_error(dit: Generator) -> None:
    from qexport.recipe import recipe_for
    from qexport.scheme import preset

    recipe = recipe_for(preset(2), dit.default_layers, "w2", algorithm="mse")
    settings = replace(SETTINGS, samples=60, held_out=20, batch=8, steps=8, per_trajectory=10)
    found = distill(dit, recipe, Solution(), settings)
    assert found.report["figure"] == "output_mse"
    assert found.report["best"] < 0.75 * found.report["start"]
    with pytest.raises(InputError, match="no scales to weigh"):
        distill(dit, recipe, Solution(), replace(settings, scale_weights=(1.0,)))


def test_too_little_memory_is_said_before_the_first_step(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.distill.memory.available_bytes", lambda: 1_000_000)
    with pytest.raises(
        InputError, match=r"^distillation needs about 0\.0 GB, 0\.0 GB are free; make the batch smaller"
    ):
        distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)


def test_settings_out_of_range_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"samples": 4, "held_out": 4}, "nothing to train on"),
        ({"scale_lr": math.nan}, "scale_lr is nan"),
        ({"rest_lr": -0.1}, "rest_lr is -0.1"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError, match=message):
            DistillSettings(**bad)


def test_rate_falls_along_half_a_cosine() -> None:
    settings = DistillSettings(steps=100)
    assert settings.rate(0) == 1
    assert settings.rate(50) == pytest.approx(0.5)
    warmed = replace(settings, warmup=9)
    assert warmed.rate(0) == pytest.approx(0.1)
    assert warmed.rate(20) == settings.rate(20)
    assert settings.rate(99) == pytest.approx((1 + math.cos(math.pi * 0.99)) / 2)


def test_weights_of_scales_count(tiny: Generator) -> None:
    """All weight on the first scale: the loss is that of the first position."""
    assert tiny.quality is not None
    scales = len(tiny.quality.scale_lengths)
    task = TokenTask(tiny, Distillation("forward"), [1.0] + [0.0] * (scales - 1))
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 14, 64, generator=generator) for _ in range(2))
    batch = (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 14, dtype=torch.int64))
    first = Distillation("forward")(p[:, :1], q[:, :1], batch[1][:, :1]).mean()
    assert task.loss(p, q, batch).item() == pytest.approx(first.item(), rel=1e-5)
    for bad in ([1.0], [-1.0] * scales, [0.0] * scales):
        with pytest.raises(InputError, match="scale weights"):
            TokenTask(tiny, Distillation("forward"), bad)


def test_a_teacher_of_another_model_is_said(dit: Generator) -> None:
    from qexport.distill.tasks import DenoiseTask

    logits = torch.zeros(2, 14, 64), torch.zeros(2, 14, 65)
    with pytest.raises(InputError, match=r"\(2, 14, 64\) and \(2, 14, 65\).*they are not the same model"):
        Distillation("forward")(*logits, torch.zeros(2, 14, dtype=torch.int64))
    with pytest.raises(InputError, match=r"\(2, 8, 4, 4\) and \(2, 4, 4, 4\); they are not the same model"):
        DenoiseTask(dit).loss(torch.zeros(2, 8, 4, 4), torch.zeros(2, 4, 4, 4), ())


def test_a_family_that_turns_gradients_off_is_said(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(tiny.quality)
    monkeypatch.setattr(kind, "teacher_forced_logits", torch.no_grad()(kind.teacher_forced_logits))  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no gradient passes through the model; its family must not turn them off"):
        distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)
