"""Parameters trained in floating point are read from the bundle if it says so, and must fit the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import PlaceOf, Sign, change, check, climb, failure

from qexport.bundle import Bundle, Manifest
from qexport.distill import Distilled, DistillSettings, distill, drawn_tokens
from qexport.errors import BundleError, InputError
from qexport.export import export
from qexport.family import Generator
from qexport.pipeline import load_generator
from qexport.recipe import Recipe, Rule
from qexport.scheme import preset
from qexport.solution import Solution
from qexport.verify.checks import Place
from qexport.verify.onnx_file import OnnxFile
from qexport.verify.solved_codes import NAME as CODES
from qexport.verify.trained_floats import NAME, TrainedFloat, check_floats, listed_floats
from qexport.verify.weights import OTHERS

RECORD = {"method": "topkld", "loss": "split", "top_k": 900, "start_from": "rtn", "graph": "step", "data": "random"}
BIAS, TWIN, MATRIX = "blocks.0.ffn.fc2.bias", "blocks.1.ffn.fc2.bias", "head.weight"

Bytes = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe("rtn", (Rule("blocks.*.fc2", preset(4).weight, "rtn"),))


@pytest.fixture(scope="module")
def found(generator: Generator, recipe: Recipe) -> Distilled:
    """Two matrices and all that is not quantised, a few steps."""
    settings = DistillSettings(steps=4, batch=4, samples=12, held_out=4, evaluate_every=1, lr=0.001, rest_lr=0.0005)
    return distill(generator, recipe, Solution(), settings, data=drawn_tokens(generator, settings.samples, 0))


@pytest.fixture(scope="module")
def trained(generator: Generator, recipe: Recipe, found: Distilled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert found.report["best_step"] > 0
    out = tmp_path_factory.mktemp("floats") / "bundle"
    return export(
        generator, recipe, out, solution=found.solution, training=RECORD, progress=lambda stage, done, total: None
    ).path


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "damaged"))


def record_of(root: Path) -> dict[str, Any]:
    training = Manifest.loads((root / "manifest.json").read_bytes()).training
    assert training is not None
    return json.loads(json.dumps(training))


def scaled(factor: float, dtype: str) -> Bytes:
    return lambda part: (part.view(dtype) * np.dtype(dtype).type(factor)).view(np.uint8)


def test_sound(trained: Path, generator: Generator) -> None:
    report = check(trained, generator)
    assert report.passed, [(one.name, one.detail) for one in report.failures]
    told = next(one for one in report.checks if one.name == NAME)
    count = len(listed_floats(Bundle.open(trained, "size").manifest))
    assert told.detail == f"{count} were trained, they are the bundle's"


def test_the_bundle_holds_what_was_judged_and_lists_it(trained: Path, generator: Generator, found: Distilled) -> None:
    rows = record_of(trained)["floats"]
    floats = found.solution.floats
    assert {f"step/{row['name']}" for row in rows} == set(floats)
    assert record_of(trained) == RECORD | {"floats": rows}
    assert {BIAS, TWIN, MATRIX, "pos_start", "class_emb.weight"} <= {row["name"] for row in rows}
    assert not [row["name"] for row in rows if row["name"].startswith("quantize.") or "fc2.weight" in row["name"]]
    file = OnnxFile("step", trained / "step.onnx", trained)
    own = generator.graph("step").parameters()
    for place, value in floats.items():
        name = place.removeprefix("step/")
        stored = file.read(name)
        flipped = any(node.op_type == "MatMul" and index == 1 for node, index in file.users(name))
        np.testing.assert_array_equal(stored.T if flipped else stored, value)
        assert not np.array_equal(value, own[name].detach().numpy().astype(value.dtype))


def test_of_a_denoiser(tmp_path: Path) -> None:
    dit = load_generator("dit-c10-d2")
    recipe = Recipe("rtn", (Rule("blocks.*.fc2", preset(4).weight, "rtn"),))
    settings = DistillSettings(
        steps=2, batch=4, samples=20, held_out=4, evaluate_every=1, lr=0.0001, scale_lr=0.0, rest_lr=0.0001
    )
    found = distill(dit, recipe, Solution(), settings)
    assert found.report["best_step"] > 0
    record = RECORD | {"graph": "denoise"}
    bundle = export(
        dit, recipe, tmp_path / "b", solution=found.solution, training=record, progress=lambda *told: None
    ).path
    assert {"pos_embed", "final_layer.linear.weight"} <= {row["name"] for row in record_of(bundle)["floats"]}
    report = climb(bundle, dit)
    assert report.passed, [(one.name, one.detail) for one in report.failures]
    assert NAME in [one.name for one in report.checks]


@pytest.mark.parametrize(
    ("name", "to"), [(BIAS, scaled(1.01, "<f4")), (MATRIX, scaled(1.125, "<f2")), ("pos_start", scaled(-1, "<f2"))]
)
def test_a_changed_parameter(
    damaged: Path, generator: Generator, sign_again: Sign, place_of: PlaceOf, name: str, to: Bytes
) -> None:
    change(damaged, place_of(damaged, name), to)
    sign_again(damaged)
    assert str(failure(climb(damaged, generator), NAME).place) == f"step/{name}"


def test_exchanged_parameters_although_the_manifest_was_changed_to_fit(
    damaged: Path, generator: Generator, sign_again: Sign, place_of: PlaceOf
) -> None:
    data = np.fromfile(damaged / "weights.data", np.uint8)
    offset, length = place_of(damaged, TWIN)
    change(damaged, place_of(damaged, BIAS), lambda part: data[offset : offset + length])
    sign_again(damaged)
    told = failure(climb(damaged, generator), NAME)
    assert str(told.place) == f"step/{BIAS}"
    training = record_of(damaged)
    row = next(row for row in training["floats"] if row["name"] == BIAS)
    row["sqnr_db"] = float(told.detail.partition(" dB")[0])
    sign_again(damaged, training=training)
    told = failure(climb(damaged, generator), NAME)
    assert str(told.place) == f"step/{BIAS}"
    assert "correlation" in told.detail


def test_one_that_is_not_listed_must_be_the_checkpoints(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    training = record_of(damaged)
    training["floats"] = [row for row in training["floats"] if row["name"] != BIAS]
    sign_again(damaged, training=training)
    report = climb(damaged, generator)
    assert str(failure(report, OTHERS).place) == f"step/{BIAS}"
    assert all(one.passed for one in report.checks if one.name in (NAME, CODES))


def test_a_list_that_does_not_fit_is_an_error(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    """Codes, and names that the model does not have, are no trained parameters; nothing is skipped then."""
    whole = record_of(damaged)
    cases = {
        "nothing": "was trained, which the model does not have",
        "blocks.0.ffn.fc2.weight": "is int8",
        "ema_vocab_hit_SV": "was trained, which the model does not have",
    }
    for name, says in cases.items():
        sign_again(damaged, training={**whole, "floats": [{"name": name, "sqnr_db": 30.0}]})
        report = climb(damaged, generator)
        assert not report.passed
        assert any(says in one.detail for one in report.failures), [one.detail for one in report.failures]


def test_a_malformed_list_is_refused(damaged: Path, sign_again: Sign) -> None:
    sound = (damaged / "manifest.json").read_bytes()
    for rows in ([{"name": 3, "sqnr_db": 1.0}], [{"name": "head.bias", "sqnr_db": "much"}], [{"name": "head.bias"}]):
        (damaged / "manifest.json").write_bytes(sound)
        sign_again(damaged, training=RECORD | {"floats": rows})
        with pytest.raises(BundleError, match="is malformed"):
            Bundle.open(damaged, "size")


def test_trained_parameters_without_a_record_are_not_written(
    generator: Generator, recipe: Recipe, found: Distilled, tmp_path: Path
) -> None:
    for training in (None, RECORD | {"graph": "decode"}):
        with pytest.raises(InputError, match="was trained, which the record of training does not say"):
            export(
                generator, recipe, tmp_path / "out", solution=found.solution, training=training,
                progress=lambda stage, done, total: None,
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_limits_by_hand(trained: Path) -> None:
    manifest = Bundle.open(trained, "size").manifest
    manifest = replace(manifest, training=RECORD | {"floats": [{"name": BIAS, "sqnr_db": 30.0}]})

    def passed(correlation: float, found_db: float = 30.0) -> bool:
        told = check_floats([TrainedFloat(Place("step", BIAS), found_db, correlation, 0.5)], manifest)
        assert told is not None
        return told.passed

    assert passed(0.9)
    assert not passed(0.9, 30.002)
    assert not passed(0.9, float("inf"))  # listed, and the checkpoint's own
    assert not passed(0.4)
    assert not passed(float("nan"))
