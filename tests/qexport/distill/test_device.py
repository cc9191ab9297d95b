"""Training, playing and judging on a device, as far as a machine without one can tell: no tensor is left on the CPU.

The device is "meta", whose tensors hold no numbers; an operation that takes a tensor of it and one of the CPU raises
here, as it does on a GPU. What needs numbers (rates, codes) is made on the CPU first. The real thing is
`tests/gpu/test_torch_device.py`.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qexport.compare import judge as judge_module
from qexport.distill import Distillation, DistillSettings, Samples, distill
from qexport.distill import trainer as trainer_module
from qexport.distill.rates import rates_of
from qexport.distill.run import make_task, require_device
from qexport.distill.student import Student, layer_parameters
from qexport.distill.tasks import TokenTask
from qexport.distill.trainer import Trainer
from qexport.errors import InputError
from qexport.family import Generator
from qexport.formats import get_format
from qexport.recipe import Recipe, recipe_for
from qexport.reference import torch_player
from qexport.reference.device import device_of, placed, to_device
from qexport.scheme import ActivationSpec, PerStep, Scheme, Static, preset
from qexport.solution import Solution
from qexport.solve import solve
from qexport.verify.quality import torch_logits

SETTINGS = DistillSettings(Distillation("split", top_k=9), steps=6, batch=4, samples=12, held_out=4, clip=1.0)


AWAY = "meta"
_COPIES = ("aten::_to_copy", "aten::copy_")


class OneDevice(TorchDispatchMode):
    """While entered, an operation on tensors of two devices raises, unless it is a copy from one to the other."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if len(places) > 1 and func.name().partition(".")[0] not in _COPIES:
            raise RuntimeError(f"{func.name()}: tensors on two devices")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> OneDevice:
    """The mode; no number is asked for."""
    monkeypatch.setattr(Tensor, "item", lambda self: 16)  # the sampler asks how many logits to sort
    monkeypatch.setattr("qexport.distill.recompute.precision", lambda *_: nullcontext())  # knows no such device
    monkeypatch.setattr("qexport.distill.trainer.precision", lambda *_: nullcontext())
    return OneDevice()


def latents(generator: Generator) -> Samples:
    spec = generator.denoise
    assert spec is not None
    numbers = torch.randn(12, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return Samples((numbers, torch.arange(12) * 80, torch.arange(12) % 10), "random latents")


def solved(generator: Generator, scales: type[Static] | type[PerStep]) -> tuple[Recipe, Solution]:
    """4-bit weights and int8 activations."""
    scheme = Scheme(preset(4).weight, ActivationSpec(get_format("int8"), scales()))
    recipe = recipe_for(scheme, generator.default_layers, "w4a8", "rtn")
    recipe = replace(recipe, calibration=replace(recipe.calibration, samples=2))
    if generator.denoise is not None:
        recipe = replace(recipe, calibration=replace(recipe.calibration, schedule="ddim-25"))
    return recipe, solve(generator, recipe)


def one_step(
    mode: OneDevice, monkeypatch: pytest.MonkeyPatch, full: Generator, recipe: Recipe, solution: Solution,
    data: Samples, settings: DistillSettings,
) -> tuple[Tensor, Trainer]:  # fmt: skip
    """A training step on the device: loss and norm, and who made it."""
    full = placed(full, "cpu")
    task = make_task(full, settings)
    student = Student(full, recipe, solution, task.predictor, task.place_steps)
    rates = [
        group["lr"] for group in trainer_module.groups(student, rates_of(student.errors, settings, task.error_share))
    ]
    teacher = copy.deepcopy(full)
    with mode:
        for generator in (teacher, student.generator):
            to_device(generator, AWAY)
        # A meta tensor cannot take the place of a real one inside of a parameter, so the parameters are other ones.
        weights = layer_parameters(student.generator, student.layers)
        student._weights = [weights[layer] for layer in student.layers]
        for rounder, weight in zip(student._rounders, student._weights, strict=True):
            weight.requires_grad_(True)
            rounder.latent, rounder.scale = weight, nn.Parameter(rounder.scale.detach().to(AWAY))
        student.activation_scales = nn.ParameterList(p.detach().to(AWAY) for p in student.activation_scales)
        parameters = [*student.latents, *student.scales, *student.activation_scales]
        groups = [{"params": [tensor], "lr": rate} for tensor, rate in zip(parameters, rates, strict=True)]
        monkeypatch.setattr(trainer_module, "groups", lambda *_: groups)
        trainer = Trainer(student, task.predictor(teacher), task, data.split(4), settings)
        found = trainer._update(student)
        return found, trainer


def assert_away(found: Tensor, trainer: Trainer) -> None:
    assert found.shape == (2,)
    assert found.dtype == torch.float64
    assert found.device.type == trainer._device.type == AWAY
    held = [
        *trainer._student.parameters(),
        *(t for s in trainer._optimiser.state.values() for t in s.values() if t.ndim),
    ]
    assert len(held) > 20
    assert {tensor.device.type for tensor in held} == {AWAY}


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize(
    "loss", ["split", "mixed", "boosted", "forward", "reverse", "js", "logit-mse", "cross-entropy"]
)
def test_a_step_of_a_token_model(away, monkeypatch, tiny, tiny_w2, tiny_tokens, loss: str, ema: float) -> None:
    settings = replace(SETTINGS, loss=Distillation(loss, top_k=9), ema=ema)
    assert_away(*one_step(away, monkeypatch, tiny, tiny_w2, Solution(), tiny_tokens, settings))


@pytest.mark.parametrize("scales", [Static, PerStep])
def test_a_step_with_activations(away, monkeypatch, tiny, tiny_tokens, scales) -> None:
    recipe, solution = solved(tiny, scales)
    assert_away(*one_step(away, monkeypatch, tiny, recipe, solution, tiny_tokens, SETTINGS))


@pytest.mark.parametrize("scales", [Static, PerStep])
def test_a_step_of_a_denoiser(away, monkeypatch, dit, scales) -> None:
    recipe, solution = solved(dit, scales)
    assert_away(*one_step(away, monkeypatch, dit, recipe, solution, latents(dit), SETTINGS))


@pytest.mark.parametrize("model", ["tiny", "dit"])
def test_judging_on_held_out_samples(away, monkeypatch, request, tiny_tokens, model: str) -> None:
    full: Generator = request.getfixturevalue(model)
    recipe = recipe_for(preset(2), full.default_layers, "w2", algorithm="mse")
    data = tiny_tokens if model == "tiny" else latents(full)
    _, trainer = one_step(away, monkeypatch, full, recipe, Solution(), data, SETTINGS)
    with away, torch.no_grad():
        batch = trainer._there(next(trainer._held.batches(4)))
        found = trainer._task.judge(trainer._teacher(*batch), trainer._student(*batch))
    assert found.device.type == AWAY


class StopError(Exception):
    """What the test ends a play with."""


@pytest.mark.parametrize("model", ["tiny", "dit"])
def test_playing_two_steps(away, request, model: str) -> None:
    full: Generator = copy.deepcopy(request.getfixturevalue(model))
    records: list[Any] = []

    def keep(record: Any) -> None:
        records.append(record)
        if len(records) == 2:
            raise StopError

    with away, pytest.raises(StopError):
        torch_player(to_device(full, AWAY)).play({"label": np.arange(3)}, observer=keep)
    for record in records:
        values = [*record.feeds.values(), *record.results.values()]
        assert {value.device.type for value in values} == {AWAY}


def test_decoding(away, tiny, dit) -> None:
    for full in map(copy.deepcopy, (tiny, dit)):
        with away:
            spec = to_device(full, AWAY).graph(full.plan.calls[-1].graph)
            sizes = {**full.plan.dims, "batch": 2}
            inputs = [torch.zeros([sizes.get(d, d) for d in port.shape], device=AWAY) for port in spec.inputs]
            assert spec.module(*inputs)[0].device.type == AWAY


def test_the_terms_of_the_judge(away, tiny, tiny_tokens) -> None:
    full = copy.deepcopy(tiny)
    labels, tokens = (tensor.numpy() for tensor in tiny_tokens.tensors)
    with away, torch.no_grad():
        log_p = judge_module._log_probabilities(torch_logits(to_device(full, AWAY))(labels, tokens))
        found = judge_module._terms(log_p, log_p + 1, torch.from_numpy(tokens).to(AWAY).reshape(-1))
    assert found.device.type == AWAY
    assert found.shape == (4, tokens.size)


def test_mutation_a_tensor_that_stays_behind_is_noticed(away, monkeypatch, tiny, tiny_w2, tiny_tokens) -> None:
    """The guard guards: a batch that nobody sends raises."""
    monkeypatch.setattr(Trainer, "_there", lambda self, batch: batch)
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        one_step(away, monkeypatch, tiny, tiny_w2, Solution(), tiny_tokens, SETTINGS)


def test_moving_is_a_copy_or_nothing(tiny) -> None:
    assert placed(tiny, "cpu") is tiny
    assert device_of(tiny).type == "cpu"
    moved = placed(tiny, AWAY)
    assert device_of(tiny).type == "cpu"
    held = [moved.quality.var, moved.quality.vae, *(spec.module for spec in moved.graphs)]
    for module in held:
        assert {value.device.type for value in (*module.parameters(), *module.buffers())} == {AWAY}


def test_losses_read_later_are_the_same(tiny, tiny_w2, tiny_tokens, monkeypatch) -> None:
    settings = replace(SETTINGS, steps=7, evaluate_every=5)
    told: list[int] = []
    found = []
    for every in (1, 3):
        monkeypatch.setitem(trainer_module.READ_EVERY, "cpu", every)
        told.clear()
        found.append(distill(
            tiny, tiny_w2, Solution(), settings, data=tiny_tokens, progress=lambda step, *_: told.append(step)
        ))  # fmt: skip
    assert told == [3, 5, 7]  # every third, and where it is judged
    assert found[0].report["losses"] == found[1].report["losses"]
    assert len(found[0].report["losses"]) == 7


def test_a_sick_step_is_noticed_before_a_checkpoint(tiny, tiny_w2, tiny_tokens, tmp_path: Path, monkeypatch) -> None:
    true_loss, calls = TokenTask.loss, []

    def sick(self, teacher, student, batch):
        calls.append(1)
        return true_loss(self, teacher, student, batch) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(TokenTask, "loss", sick)
    monkeypatch.setitem(trainer_module.READ_EVERY, "cpu", 100)
    settings = replace(SETTINGS, checkpoint_every=3)
    with pytest.raises(InputError, match="the loss is nan at step 4"):
        distill(tiny, tiny_w2, Solution(), settings, data=tiny_tokens, work=tmp_path)
    state = torch.load(next(tmp_path.iterdir()) / trainer_module.CHECKPOINT, weights_only=True)
    assert state["step"] == 3


def test_what_cannot_be_is_said(tiny, tiny_w2, tiny_tokens, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no CUDA device here"):
        distill(tiny, tiny_w2, Solution(), SETTINGS, data=tiny_tokens, device="cuda")
    with pytest.raises(InputError, match="'auto' is not one device"):
        require_device("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"--device cuda: offload keeps moments in a file .* \(sharded\)$"):
        require_device("cuda", "--device", replace(SETTINGS, offload=True))
    require_device("cuda", "--device", SETTINGS)
