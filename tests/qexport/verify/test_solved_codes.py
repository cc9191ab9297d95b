"""Codes of an algorithm that saw inputs are read from the bundle, and must still be codes of the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, LAYER, TWIN, PlaceOf, Sign, change, check, climb, failure

from qexport.bundle import Bundle
from qexport.export import export
from qexport.family import Generator
from qexport.recipe import Calibration, Recipe, Rule
from qexport.scheme import preset
from qexport.solve import solve
from qexport.verify.checks import Place
from qexport.verify.solved_codes import NAME, SolvedCodes, check_solved


@pytest.fixture(scope="module")
def solved(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe("gptq", (Rule("blocks.*.fc2", preset(4).weight, "gptq"),), calibration=Calibration(samples=4))
    solution = solve(generator, recipe)
    assert set(solution.weights) == {LAYER, TWIN}
    out = tmp_path_factory.mktemp("solved") / "bundle"
    return export(generator, recipe, out, solution=solution, progress=lambda stage, done, total: None).path


@pytest.fixture
def damaged(solved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(solved, tmp_path / "damaged"))


def test_sound(solved: Path, generator: Generator) -> None:
    report = check(solved, generator)
    assert report.passed, [(found.name, found.detail) for found in report.failures]
    assert next(found for found in report.checks if found.name == NAME).detail.startswith("2 layers")


@pytest.mark.parametrize("tensor", DAMAGES)
def test_changed_codes_and_scales(
    damaged: Path, generator: Generator, sign_again: Sign, place_of: PlaceOf, tensor: str
) -> None:
    change(damaged, place_of(damaged, tensor), DAMAGES[tensor])
    sign_again(damaged)
    assert str(failure(climb(damaged, generator), NAME).place) == f"step/{LAYER}"


def test_another_layers_codes(damaged: Path, generator: Generator, sign_again: Sign, place_of: PlaceOf) -> None:
    """Even where the manifest's own figure was changed to fit."""
    data = np.fromfile(damaged / "weights.data", np.uint8)
    for name in ("weight", "weight_scale"):
        offset, length = place_of(damaged, f"{TWIN}.{name}")
        other = data[offset : offset + length].copy()
        change(damaged, place_of(damaged, f"{LAYER}.{name}"), lambda part, other=other: other)
    sign_again(damaged)
    detail = failure(climb(damaged, generator), NAME).detail
    found_db = float(detail.partition(" dB")[0])
    rows = [dict(row) for row in Bundle.open(damaged, "size").manifest.layers]
    next(row for row in rows if row["name"] == LAYER)["sqnr_db"] = found_db
    sign_again(damaged, layers=rows)
    found = failure(climb(damaged, generator), NAME)
    assert (str(found.place), "at least" in found.detail) == (f"step/{LAYER}", True)


def test_limits_by_hand() -> None:
    def verdict(found_db: float, stated_db: object, plain_db: float = 20.0) -> bool:
        solved = SolvedCodes(Place("step", LAYER), found_db, plain_db)
        check = check_solved([solved], [{"name": LAYER, "sqnr_db": stated_db}])
        assert check is not None
        return check.passed

    assert verdict(17.0004, 17.0)
    assert not verdict(17.002, 17.0)
    assert not verdict(17.0, None)
    assert not verdict(float("nan"), 17.0)
    assert verdict(2.0, 2.0)
    assert not verdict(2.0, 2.0, plain_db=23.0)
    assert not verdict(-0.1, -0.1)
    assert check_solved([], []) is None
