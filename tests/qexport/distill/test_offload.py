"""Adam's moments in a file: where they lie, that nothing else changes, and what is said where there is no place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qexport.distill import Distillation, DistillSettings, Samples, distill
from qexport.distill.offload import OffloadedMoments
from qexport.errors import InputError
from qexport.family import Generator
from qexport.recipe import Recipe
from qexport.solution import Solution


def made(offloaded: Path | None) -> tuple[nn.Linear, torch.optim.AdamW, OffloadedMoments | None]:
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(15.0).reshape(3, 5) / 15)
        layer.bias.copy_(torch.tensor([0.5, -0.5, 0.25]))
    optimiser = torch.optim.AdamW([{"params": [p], "lr": 0.1} for p in layer.parameters()], weight_decay=0.0)
    return layer, optimiser, None if offloaded is None else OffloadedMoments(optimiser, offloaded)


def step(layer: nn.Linear, optimiser: torch.optim.AdamW, number: int) -> None:
    optimiser.zero_grad()
    layer(torch.linspace(-1, number, 5)).square().sum().backward()
    optimiser.step()


def moments(optimiser: torch.optim.AdamW) -> list[torch.Tensor]:
    return [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]


def in_the_file(offloaded: OffloadedMoments) -> bool:
    file = next(iter(offloaded._mapped.values()))["exp_avg"].untyped_storage().data_ptr()
    return {moment.untyped_storage().data_ptr() for moment in moments(offloaded._optimiser)} == {file}


def cut_off_and_resumed(folder: Path) -> None:
    """Three steps, a checkpoint after the second, against three in memory."""
    plain, in_memory, _ = made(None)
    for number in range(3):
        step(plain, in_memory, number)

    layer, optimiser, offloaded = made(folder)
    assert offloaded is not None
    for number in range(2):
        step(layer, optimiser, number)
    assert in_the_file(offloaded)
    assert all(bool(state["exp_avg_sq"].any()) for state in optimiser.state.values())
    torch.save({"layer": layer.state_dict(), "optimiser": optimiser.state_dict()}, folder / "saved.pt")

    saved = torch.load(folder / "saved.pt", weights_only=True)
    again, resumed, offloaded = made(folder)
    assert offloaded is not None
    again.load_state_dict(saved["layer"])
    resumed.load_state_dict(saved["optimiser"])
    offloaded.adopt()
    step(again, resumed, 2)
    assert in_the_file(offloaded)
    assert torch.equal(again.weight, plain.weight)
    assert torch.equal(again.bias, plain.bias)


def test_the_steps_are_those_of_memory_to_the_bit(tmp_path: Path) -> None:
    cut_off_and_resumed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.pt"]  # the file has no name


@pytest.mark.parametrize("forgotten", [lambda self: None, lambda self: [m.zero_() for m in moments(self._optimiser)]])
def test_mutation_moments_that_are_not_taken_over_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten
) -> None:
    monkeypatch.setattr(OffloadedMoments, "adopt", forgotten)
    with pytest.raises(AssertionError):
        cut_off_and_resumed(tmp_path)


def test_a_disk_without_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        InputError, match=r"moments\.0\.f32: no place for 0\.0 GB of the optimiser's moments .*No space"
    ):
        made(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="choose another folder, or do not offload"):
        made(tmp_path / "missing")


SHORT = DistillSettings(
    Distillation("forward"), steps=2, batch=4, samples=12, held_out=4, evaluate_every=1, unconditional=0.0
)  # fmt: skip


def test_a_student_is_the_same(tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples, tmp_path: Path) -> None:
    plain = distill(tiny, tiny_w2, Solution(), SHORT, data=tiny_tokens)
    found = distill(tiny, tiny_w2, Solution(), replace(SHORT, offload=True), data=tiny_tokens, work=tmp_path)
    assert found.report["losses"] == plain.report["losses"]
    assert found.report["judged"] == plain.report["judged"]
    with pytest.raises(InputError, match="an offloaded optimiser needs a folder"):
        distill(tiny, tiny_w2, Solution(), replace(SHORT, offload=True), data=tiny_tokens)


def test_moments_are_not_divided_and_offloaded_both() -> None:
    with pytest.raises(InputError, match="offload and sharded exclude each other"):
        DistillSettings(offload=True, sharded=True)
