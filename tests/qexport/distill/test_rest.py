"""What is trained beside quantised matrices: which tensors, that it helps, and that what is returned was judged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_llamagen

from qexport.distill import Distillation, Distilled, DistillSettings, Samples, distill, rest
from qexport.distill.data import drawn_tokens
from qexport.distill.memory import estimate_bytes
from qexport.distill.run import make_task
from qexport.distill.student import Student, trained_graph
from qexport.distill.tasks import TokenTask
from qexport.errors import InputError
from qexport.family import Generator
from qexport.quantize import stored_weights
from qexport.recipe import Recipe, recipe_for
from qexport.reference.twin import quantised_twin
from qexport.scheme import preset
from qexport.solution import Solution

FROZEN = DistillSettings(
    Distillation("forward"), steps=6, batch=16, lr=0.02, rest_lr=0.0, samples=48, held_out=16, evaluate_every=2,
    checkpoint_every=2,
)  # fmt: skip
SETTINGS = replace(FROZEN, rest_lr=0.01)


@pytest.fixture(scope="module")
def drawn(tiny: Generator) -> Samples:
    return drawn_tokens(tiny, 48, 0)


@pytest.fixture(scope="module")
def found(tiny: Generator, tiny_w2: Recipe, drawn: Samples) -> Iterator[Distilled]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests have: sums over positions depend on it
    yield distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)
    torch.set_num_threads(threads)


def same(one: Distilled, other: Distilled) -> bool:
    """Codes, what was trained beside, and the course of the loss, to the bit."""
    a, b = one.solution, other.solution
    return (
        one.report["losses"] == other.report["losses"]
        and a.floats.keys() == b.floats.keys()
        and all(a.floats[name].tobytes() == b.floats[name].tobytes() for name in a.floats)
        and all(np.array_equal(a.weights[layer].codes, b.weights[layer].codes) for layer in a.weights)
    )


def student_of(generator: Generator, sample: tuple[torch.Tensor, ...]) -> Student:
    task = make_task(generator, FROZEN)
    recipe = recipe_for(preset(2), generator.default_layers, "w2", algorithm="mse")
    student = Student(generator, recipe, Solution(), task.predictor, task.place_steps)
    student.train_rest(*sample)
    return student


def test_frozen_it_is_as_before_there_was_a_rate(tiny: Generator, tiny_w2: Recipe, drawn: Samples) -> None:
    assert "rest_lr" not in FROZEN.to_json()  # keys of checkpoints and digests of bundles are the old ones
    assert SETTINGS.to_json()["rest_lr"] == 0.01
    short = replace(FROZEN, steps=2)
    frozen = distill(tiny, tiny_w2, Solution(), short, data=drawn)
    assert not frozen.solution.floats
    task = TokenTask(tiny, short.loss)
    student = Student(tiny, tiny_w2, Solution(), task.predictor, task.place_steps)
    assert {name.partition(".")[0] for name in student.state()} == {"rounders"}


def test_alone_it_helps_where_it_is_held_out(tiny: Generator, tiny_w2: Recipe, drawn: Samples) -> None:
    """With weights and scales held fast KL falls by a third in six steps; without this rate either, nothing moves."""
    alone = replace(FROZEN, lr=0.0, scale_lr=0.0)
    frozen, found = (
        distill(tiny, tiny_w2, Solution(), replace(alone, rest_lr=rate), data=drawn).report for rate in (0.0, 0.02)
    )
    assert found["start"] == frozen["start"] == frozen["best"]
    assert found["best"] < 0.67 * frozen["best"]


def test_what_a_gradient_reaches_is_trained_and_nothing_else(tiny: Generator, found: Distilled) -> None:
    """Under teacher forcing tokens go through the codebook and its convolutions without a gradient."""
    parameters = dict(tiny.graph("step").parameters())
    quantised = {tiny.layers[layer][1] for layer in found.solution.weights}
    wanted = {
        f"step/{name}"
        for name, value in parameters.items()
        if isinstance(value, torch.nn.Parameter) and name not in quantised and not name.startswith("quantize.")
    }
    assert any(name.startswith("quantize.") for name in parameters)
    assert set(found.solution.floats) == wanted


def test_of_a_student_the_others_stay_as_they_are(tiny: Generator, drawn: Samples) -> None:
    student = student_of(tiny, next(drawn.batches(1)))
    before = {name: value.clone() for name, value in student.generator.graph("step").parameters().items()}
    student(*(tensor[:2] for tensor in drawn.tensors)).square().mean().backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    moved = {n for n, v in student.generator.graph("step").parameters().items() if not torch.equal(v, before[n])}
    assert moved
    assert not [name for name in moved if name.startswith("quantize.")]
    assert all(parameter.grad is not None for parameter in student.parameters())  # what DistributedDataParallel needs


def test_other_families(dit: Generator) -> None:
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    llamagen = tiny_llamagen()
    assert llamagen.quality is not None
    length = sum(llamagen.quality.scale_lengths)
    samples = {
        "dit": (dit, (noisy, torch.tensor([700]), torch.tensor([1]))),
        "llamagen": (llamagen, (torch.tensor([1]), torch.arange(length)[None])),
    }
    for name, (generator, sample) in samples.items():
        student = student_of(generator, sample)
        trained = {place.partition("/")[2] for place in student.finish().floats}
        graph = generator.graph(trained_graph(generator)).parameters()
        quantised = {generator.layers[layer][1] for layer in student.layers}
        missing = {n for n, v in graph.items() if isinstance(v, torch.nn.Parameter) and n not in trained | quantised}
        assert trained, name
        assert not missing, name
        assert not trained & quantised, name


def test_zeros_are_left_alone(tiny: Generator, drawn: Samples) -> None:
    changed = copy.deepcopy(tiny)
    with torch.no_grad():
        changed.graph("step").parameters()["blocks.0.attn.q_bias"].zero_()
    floats = student_of(changed, next(drawn.batches(1))).finish().floats
    assert "step/blocks.0.attn.q_bias" not in floats
    assert "step/blocks.1.attn.q_bias" in floats


def test_a_parameter_of_two_names_is_trained_once_and_told_twice() -> None:
    shared = torch.nn.Linear(2, 2)

    class Graph:
        name = "step"

        def parameters(self):
            return {"a.weight": shared.weight, "b.weight": shared.weight, "bias": shared.bias, "n": torch.zeros(3)}

    named = rest.candidates(Graph(), [shared.bias])  # type: ignore[arg-type]
    assert [(names, id(value)) for names, value in named] == [(("a.weight", "b.weight"), id(shared.weight))]


def test_what_is_returned_is_what_was_judged(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, found: Distilled
) -> None:
    """The twin that a bundle is compared with has the figure of the report; matrices are those of fp16."""
    twin = quantised_twin(tiny, tiny_w2, found.solution).quantised
    task = TokenTask(tiny, FROZEN.loss)
    held = drawn.split(FROZEN.held_out)[1].tensors
    with torch.no_grad():
        error, count = task.judge(task.predictor(tiny)(*held), task.predictor(twin)(*held)).tolist()
    assert error / count == pytest.approx(found.report["best"], rel=1e-9)
    for place, value in found.solution.floats.items():
        own = tiny.graph("step").parameters()[place.removeprefix("step/")]
        assert value.dtype == (np.float16 if own.ndim >= 2 else np.float32)
        assert not np.array_equal(value, own.detach().numpy().astype(value.dtype))


def test_mutation_unrounded_values_are_judged_otherwise(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(rest, "stored", lambda parameters: nullcontext())
    unrounded = distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)
    with pytest.raises(AssertionError):
        test_what_is_returned_is_what_was_judged(tiny, tiny_w2, drawn, unrounded)


def test_values_come_back_after_they_were_stored() -> None:
    matrix, vector = torch.tensor([[1 / 3]]), torch.tensor([1 / 3])
    with rest.stored([matrix, vector]):
        assert float(matrix) == float(np.float16(1 / 3))
        assert float(vector) == float(np.float32(1 / 3))
    assert float(matrix) == float(np.float32(1 / 3))


class KilledError(Exception):
    """What the tests end a run with."""


@pytest.mark.parametrize("changed", [{}, {"ema": 0.5}, {"offload": True}], ids=str)
def test_killed_and_resumed_is_as_if_not_killed(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path, changed: dict
) -> None:
    settings = replace(SETTINGS, **changed)
    whole = distill(tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path / "whole")

    def kill(step: int, *told: object) -> None:
        if step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        distill(tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path, progress=kill)
    resumed = distill(tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path)
    assert resumed.report["resumed_after"] == 2
    assert same(whole, resumed)
    again = distill(tiny, tiny_w2, Solution(), settings, data=drawn, work=tmp_path)  # the best comes from the file
    assert again.report["resumed_after"] == 6
    assert same(whole, again)


@pytest.mark.parametrize("changed", [{"recompute": True}, {"offload": True}, {"cached": True}], ids=str)
def test_memory_and_time_alone_change_nothing(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, found: Distilled, tmp_path: Path, changed: dict
) -> None:
    assert same(found, distill(tiny, tiny_w2, Solution(), replace(SETTINGS, **changed), data=drawn, work=tmp_path))


def test_a_mean_is_what_is_returned(tiny: Generator, tiny_w2: Recipe, drawn: Samples, found: Distilled) -> None:
    averaged = distill(tiny, tiny_w2, Solution(), replace(SETTINGS, ema=0.5), data=drawn)
    assert averaged.report["losses"] == found.report["losses"]
    one, other = (run.solution.floats["step/head.bias"] for run in (averaged, found))
    assert not np.array_equal(one, other)
    test_what_is_returned_is_what_was_judged(tiny, tiny_w2, drawn, averaged)


def test_memory_by_hand(tiny: Generator, tiny_tokens: Samples) -> None:
    """A number that is trained beside: gradient, two moments, and three copies of four bytes; more with a mean."""
    sample = next(tiny_tokens.batches(1))
    student = student_of(tiny, sample)
    count = sum(parameter.numel() for parameter in student.rest)
    held, student.rest = student.rest, torch.nn.ParameterList()  # the same forward pass, nothing trained beside
    without = [estimate_bytes(student, sample, replace(FROZEN, **changed)) for changed in CHANGES]
    student.rest = held
    with_rest = [estimate_bytes(student, sample, replace(FROZEN, **changed)) for changed in CHANGES]
    grown = [(b - a) / (1.1 * count) for a, b in zip(without, with_rest, strict=True)]
    assert grown == pytest.approx([24, 28, 16], rel=1e-3)


CHANGES: list[dict] = [{}, {"ema": 0.5}, {"offload": True}]


def test_it_goes_on_from_what_was_trained_before(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, found: Distilled
) -> None:
    more = distill(tiny, tiny_w2, found.solution, replace(SETTINGS, steps=2, lr=0.005, rest_lr=0.001), data=drawn)
    assert more.report["start"] == pytest.approx(found.report["best"], rel=1e-9)
    assert more.report["best"] < more.report["start"]


def test_a_solution_of_another_model_is_refused(tiny: Generator, tiny_w2: Recipe) -> None:
    right = np.ones((1, 1, 64), np.float16)
    cases = [
        ({"step/nothing": right}, "step/nothing: was trained, and tiny has no such parameter"),
        ({"step/pos_start": right[..., :3]}, r"pos_start: was trained as float16 \(1, 1, 3\)"),
        ({"step/pos_start": right.astype(np.float32)}, "pos_start: was trained as float32"),
        ({"step/pos_start": right * np.float16(np.nan)}, "pos_start: holds NaN or infinity"),
        ({"step/blocks.0.ffn.fc1.weight": right}, "fc1.weight: was trained in floating point, and the recipe"),
    ]
    for floats, says in cases:
        with pytest.raises(InputError, match=says):
            list(stored_weights(tiny, tiny_w2, Solution(floats=floats)))
