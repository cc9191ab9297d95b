"""Codes that were trained are read from the bundle, whatever they started from, and must still be of the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, LAYER, TWIN, PlaceOf, Sign, change, check, climb, failure

from qexport.bundle import Bundle
from qexport.distill import DistillSettings, distill, drawn_tokens
from qexport.export import export
from qexport.family import Generator
from qexport.recipe import Recipe, Rule
from qexport.scheme import preset
from qexport.solution import Solution
from qexport.verify.checks import Place
from qexport.verify.solved_codes import LEAST_CORRELATION_SIGMAS, NAME, SolvedCodes, check_solved

RECORD = {"method": "topkld", "loss": "split", "top_k": 900, "start_from": "rtn", "graph": "step", "data": "random"}


@pytest.fixture(scope="module")
def trained(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two matrices, from rounding to nearest, a few steps: their codes are not what the recipe says."""
    recipe = Recipe("rtn", (Rule("blocks.*.fc2", preset(4).weight, "rtn"),))
    settings = DistillSettings(steps=4, batch=4, samples=12, held_out=4, evaluate_every=1, rest_lr=0.0)
    data = drawn_tokens(generator, settings.samples, 0)
    found = distill(generator, recipe, Solution(), settings, data=data)
    assert found.report["best_step"] > 0
    out = tmp_path_factory.mktemp("trained") / "bundle"
    return export(
        generator, recipe, out, solution=found.solution, training=RECORD, progress=lambda stage, done, total: None
    ).path


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "damaged"))


def test_sound(trained: Path, generator: Generator) -> None:
    report = check(trained, generator)
    assert report.passed, [(found.name, found.detail) for found in report.failures]
    found = next(found for found in report.checks if found.name == NAME)
    assert found.detail == "2 layers were trained, their codes are the bundle's"


def test_without_the_record_its_codes_are_not_those_of_the_recipe(
    damaged: Path, generator: Generator, sign_again: Sign
) -> None:
    """The reference rounds to nearest then, and the weights are others."""
    sign_again(damaged, training=None)
    found = failure(climb(damaged, generator), "quantised weights that differ")
    assert str(found.place).startswith("step/blocks.")


@pytest.mark.parametrize("tensor", DAMAGES)
def test_changed_codes_and_scales(
    damaged: Path, generator: Generator, sign_again: Sign, place_of: PlaceOf, tensor: str
) -> None:
    change(damaged, place_of(damaged, tensor), DAMAGES[tensor])
    sign_again(damaged)
    assert str(failure(climb(damaged, generator), NAME).place) == f"step/{LAYER}"


def test_another_layers_codes_although_the_manifest_was_changed_to_fit(
    damaged: Path, generator: Generator, sign_again: Sign, place_of: PlaceOf
) -> None:
    data = np.fromfile(damaged / "weights.data", np.uint8)
    for name in ("weight", "weight_scale"):
        offset, length = place_of(damaged, f"{TWIN}.{name}")
        other = data[offset : offset + length].copy()
        change(damaged, place_of(damaged, f"{LAYER}.{name}"), lambda part, other=other: other)
    sign_again(damaged)
    found_db = float(failure(climb(damaged, generator), NAME).detail.partition(" dB")[0])
    rows = [dict(row) for row in Bundle.open(damaged, "size").manifest.layers]
    next(row for row in rows if row["name"] == LAYER)["sqnr_db"] = found_db
    sign_again(damaged, layers=rows)
    found = failure(climb(damaged, generator), NAME)
    assert str(found.place) == f"step/{LAYER}"
    assert "correlation" in found.detail


def test_limits_by_hand() -> None:
    def passed(correlation: float, stated_db: float = -3.0, found_db: float = -3.0) -> bool:
        layer = SolvedCodes(Place("step", LAYER), found_db, 20.0, correlation, LEAST_CORRELATION_SIGMAS / 256)
        check = check_solved([layer], [{"name": LAYER, "sqnr_db": stated_db}])
        assert check is not None
        return check.passed

    assert passed(0.9)  # however far training went from the weight
    assert not passed(0.9, stated_db=-3.002)
    assert not passed(0.03)
    assert not passed(-0.9)
    assert not passed(float("nan"))


def test_the_record_survives_the_manifest(trained: Path) -> None:
    manifest = Bundle.open(trained, "size").manifest
    assert manifest.training == RECORD
    assert manifest.scheme == "rtn-topkld"
    assert [row["algorithm"] for row in manifest.layers if row["algorithm"]] == ["rtn+topkld"] * 2
