"""`qexport quantize --calibration-data`: images in place of the model's own samples, and what is refused at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_shared_aln

from qexport import pipeline
from qexport.bundle import Bundle

QUANTIZE = ("quantize", "--model", "tiny", "--group-size", "16", "--method", "gptq")


@pytest.fixture
def small(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line in an empty folder, where every model is a tiny one of 6 × 6 pixels."""
    generator = tiny_shared_aln()
    entry = replace(generator.entry, image_size=6)
    monkeypatch.setattr(pipeline, "load_generator", lambda *given: replace(tiny_shared_aln(), entry=entry))
    monkeypatch.chdir(tmp_path)
    return run


def images(path: Path, count: int, side: int = 6, labels: int = 10) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(count) % labels)
    return path.name


@pytest.mark.usefixtures("one_thread")
def test_recipe_and_manifest_name_the_images_and_the_recipe_makes_the_same_bundle(small, tmp_path: Path) -> None:
    data = images(tmp_path / "mine.npz", 9)
    outcome = small(*QUANTIZE, "--calibration-data", data, "--seed", "3", "--out", "a", "--json")
    assert outcome.code == 0, outcome.err
    manifest = Bundle.open(tmp_path / "a").manifest
    assert manifest.calibration is not None
    assert (manifest.calibration["images"], manifest.calibration["samples"]) == ("mine.npz", 9)
    recipe = tmp_path / "a" / manifest.recipe
    assert manifest.calibration["images_sha256"] in recipe.read_text()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / data).rename(tmp_path / "elsewhere" / data)
    again = ("quantize", "--model", "tiny", "--recipe", recipe, "--out", "b")
    outcome = small(*again)
    assert outcome.code == 2
    assert "calibrated on images of 'mine.npz'; say where they are by --calibration-data" in outcome.error
    outcome = small(*again, "--calibration-data", f"elsewhere/{data}")
    assert outcome.code == 0, outcome.err
    assert Bundle.open(tmp_path / "b").manifest.digest == manifest.digest
    assert small(*QUANTIZE, "--calibration-samples", "9", "--seed", "3", "--out", "own").code == 0
    own = json.loads((tmp_path / "own" / "manifest.json").read_text())
    assert "calibration" not in own
    assert own["layers"] != json.loads((tmp_path / "a" / "manifest.json").read_text())["layers"]


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (lambda at: "missing", (), "missing: no such file or folder"),
        (lambda at: images(at / "big.npz", 4, side=8), (), "is 8×8; this model takes 6×6"),
        (lambda at: images(at / "many.npz", 12, labels=12), (), "labels reach from 0 to 11; this model has 0 … 9"),
        (lambda at: (at / "bad.npz").write_bytes(b"PK") and "bad.npz", (), "bad.npz: cannot be read as .npz"),
        (
            lambda at: images(at / "x.npz", 3),
            ("--calibration-samples", "4"),
            "holds 3 images; 4 samples were asked for",
        ),
        (lambda at: images(at / "x.npz", 3), ("--method", "rtn"), "looks at no inputs"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_anything_slow(
    small, tmp_path, monkeypatch, make, arguments, says
) -> None:
    def slow(*given: object, **named: object) -> None:
        raise AssertionError("solved")

    monkeypatch.setattr("qexport.solve.solve", slow)
    outcome = small(*QUANTIZE, *arguments, "--calibration-data", make(tmp_path), "--out", "b")
    assert outcome.code == 2
    assert says in outcome.error
    assert not (tmp_path / "b").exists()
