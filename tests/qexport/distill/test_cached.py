"""A teacher whose outputs are kept: asked once, the same bits, also after being killed."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import SETTINGS, KilledError, same

from qexport.distill import Distilled, Samples, distill, drawn_tokens
from qexport.distill.cached import DONE, OUTPUTS, CachedTeacher
from qexport.errors import InputError
from qexport.family import Generator
from qexport.recipe import Recipe
from qexport.solution import Solution

CACHED = replace(SETTINGS, cached=True)
"""Six steps of 16 of 32 samples: each is met three times."""


@pytest.fixture(scope="module")
def drawn(tiny: Generator) -> Samples:
    return drawn_tokens(tiny, 48, 0)


@pytest.fixture(scope="module")
def live(tiny: Generator, tiny_w2: Recipe, drawn: Samples) -> Distilled:
    return distill(tiny, tiny_w2, Solution(), SETTINGS, data=drawn)


def test_the_same_result_as_live(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, live: Distilled, tmp_path: Path
) -> None:
    found = distill(tiny, tiny_w2, Solution(), CACHED, data=drawn, work=tmp_path)
    assert same(live, found)
    folder = next(tmp_path.iterdir())
    assert (folder / OUTPUTS).stat().st_size == 32 * 14 * 64 * 4
    assert np.fromfile(folder / DONE, np.uint8).tolist() == [1] * 32


def test_killed_and_resumed_is_as_if_not_killed(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, live: Distilled, tmp_path: Path
) -> None:
    def kill(step: int, *rest: object) -> None:
        if step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        distill(tiny, tiny_w2, Solution(), CACHED, data=drawn, work=tmp_path, progress=kill)
    assert same(live, distill(tiny, tiny_w2, Solution(), CACHED, data=drawn, work=tmp_path))


def test_it_is_asked_once_for_each_sample(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def teacher(x: torch.Tensor) -> torch.Tensor:
        asked.append(x.tolist())
        return torch.stack((x, x * 2), dim=1)

    values = torch.tensor([0.5, 1.5, 2.5, 3.5])
    for number in range(2):  # the second time as a process that goes on
        cached = CachedTeacher(teacher, tmp_path, 4)
        for index in (torch.tensor([3, 0]), torch.tensor([0, 3]), torch.tensor([1, 0]), torch.tensor([2, 1])):
            found = cached(index, (values[index],))
            assert found.tolist() == [[float(v), float(2 * v)] for v in values[index]]
        first = [[3.5, 0.5], [1.5, 0.5], [2.5, 1.5]]
        assert asked == first + [[3.5, 0.5]] * number  # one more, to learn the shape


def test_mutation_rows_of_other_samples_are_noticed(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, live: Distilled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_call = CachedTeacher.__call__
    monkeypatch.setattr(CachedTeacher, "__call__", lambda self, index, batch: true_call(self, index.flip(0), batch))
    assert not same(live, distill(tiny, tiny_w2, Solution(), CACHED, data=drawn, work=tmp_path))


def test_a_disk_without_room_and_no_folder_are_said(
    tiny: Generator, tiny_w2: Recipe, drawn: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="a cached teacher needs a folder"):
        distill(tiny, tiny_w2, Solution(), CACHED, data=drawn)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 0, 1000))
    with pytest.raises(InputError, match=r"outputs take 0\.0 GB, 0\.0 GB are free; take fewer samples"):
        distill(tiny, tiny_w2, Solution(), CACHED, data=drawn, work=tmp_path)
    assert not list(tmp_path.glob(f"*/{OUTPUTS}"))
