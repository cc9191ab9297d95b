"""`qexport score` with a stand-in for the network; `tests/qexport/verify/test_inception.py` has the real one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "qexport" / "verify"))

REDDISH, GREY = (1.0, 0.6, 0.2), (0.8, 0.8, 0.6)


@pytest.fixture
def load(monkeypatch):
    """Replaces the network; what the weights are called is up to the test."""
    from inception_support import Stand

    from qexport.verify import inception_run
    from qexport.verify.inception import WEIGHTS_SHA256, InceptionExtractor

    def loading(weights_sha256: str = WEIGHTS_SHA256):
        monkeypatch.setattr(
            inception_run, "load_inception", lambda path, provider: InceptionExtractor(Stand(), weights_sha256)
        )

    loading()
    return loading


@pytest.fixture
def drawn(tmp_path):
    from inception_support import blocks, write_folder

    return write_folder(tmp_path / "drawn", blocks(40, 0, REDDISH))


@pytest.fixture
def real(tmp_path):
    from inception_support import blocks

    np.savez(tmp_path / "real.npz", arr_0=blocks(30, 1, GREY))
    return tmp_path / "real.npz"


def scores(run, *arguments):
    outcome = run("score", *arguments, "--inception", "w.pth", "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.mark.parametrize("columns", [80, 120])
def test_figures_with_their_names(run, load, drawn, real, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = run("score", drawn, "--inception", "w.pth", "--reference", real, "--splits", 2)
    assert outcome.code == 0
    for text in ("40 of 4×4, drawn", "30 images of real.npz", "FID", "Inception-v3, n = 40", "over 2 parts", "95 %"):
        assert text in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= columns
    notes = outcome.err.splitlines()
    assert len(notes) == 2
    assert "rank 39" in notes[0]
    assert "30 real images" in notes[1]


def test_fid_against_numpy(run, load, drawn, real):
    from inception_support import blocks

    from qexport.numerics.metrics import frechet_distance

    found = scores(run, drawn, "--reference", real)
    # The stand-in is linear, so the distance is that of 48 pixels through its projection.
    from inception_support import Stand

    projection = Stand().features.numpy().astype(np.float64)
    sides = [
        (images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 128 - 1) @ projection
        for images in (blocks(40, 0, REDDISH), blocks(30, 1, GREY))
    ]
    basis = np.linalg.qr(projection.T)[0]  # 48 directions hold everything
    (a, b) = (side @ basis for side in sides)
    expected = frechet_distance(a.mean(axis=0), np.cov(a.T), b.mean(axis=0), np.cov(b.T))
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-4)
    assert found["fid"]["ci95"][0] < expected < found["fid"]["ci95"][1]
    assert found["fid"]["n"] == found["n"] == 40
    assert found["inception_score"]["splits"] == 10


def test_a_saved_reference_gives_the_same_figure(run, load, drawn, real, tmp_path):
    saved = scores(run, real, "--save", tmp_path / "stats.npz")
    assert "fid" not in saved
    assert saved["saved"].endswith("stats.npz")
    directly = scores(run, drawn, "--reference", real)
    kept = scores(run, drawn, "--reference", tmp_path / "stats.npz")
    assert kept["fid"]["value"] == pytest.approx(directly["fid"]["value"], rel=1e-9)
    assert kept["reference"] == "30 images of stats.npz"
    assert kept["fid"]["value"] != scores(run, drawn, "--reference", drawn)["fid"]["value"]


def test_other_weights_give_no_fid(run, load, drawn, real):
    load("12345678" + 56 * "0")
    found = scores(run, drawn, "--reference", real)
    assert "fid" not in found
    assert found["fd"]["name"] == "Inception-v3 with weights 12345678"
    assert not found["weights_published"]
    assert "not the published weights" in found["notes"][0]
    assert "FID" not in run("score", drawn, "--inception", "w.pth", "--reference", real).out


def test_several_folders_are_one_set(run, load, drawn, tmp_path):
    from inception_support import blocks, write_folder

    more = write_folder(tmp_path / "more", blocks(8, 3, GREY))
    assert scores(run, drawn, more)["n"] == 48


def test_wrong_input_is_one_line(run, load, drawn, real, tmp_path):
    from inception_support import blocks, write_folder

    large = write_folder(tmp_path / "large", blocks(3, 0, GREY, 8))
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    stats = tmp_path / "other.npz"
    for arguments, says in (
        (["absent"], "no such file or folder"),
        ([drawn, large], "images are 8×8, those of"),
        ([drawn, "--splits", 21], "IS in 21 parts needs 42"),
        ([drawn, "--reference", "gone"], "--reference gone: no such file or folder"),
        ([drawn, "--reference", large], "images are 8×8, those to judge 4×4; resize"),
        ([drawn, "--reference", stats], "of other features; they must be (2048,)"),
        ([drawn, "--reference", stats, "--reference", real], "of other features"),
        ([drawn, "--save", tmp_path], "name a file"),
        ([drawn, "--save", tmp_path / "s.txt"], "must end in .npz"),
    ):
        outcome = run("score", *arguments, "--inception", "w.pth")
        assert outcome.code == 2
        assert outcome.out == ""
        assert says in outcome.error


def test_statistics_and_images_are_not_mixed(run, load, drawn, real, tmp_path):
    scores(run, real, "--save", tmp_path / "stats.npz")
    outcome = run("score", drawn, "--inception", "w", "--reference", tmp_path / "stats.npz", "--reference", real)
    assert outcome.code == 2
    assert "not both" in outcome.error


def test_weights_that_are_none(run, drawn, tmp_path):
    (tmp_path / "w.pth").write_text("<html>")
    outcome = run("score", drawn, "--inception", tmp_path / "w.pth")
    assert outcome.code == 2
    assert "is a web page, not weights" in outcome.error


def test_nothing_is_left_of_a_file_that_failed(run, load, drawn, tmp_path, monkeypatch):
    from qexport.verify import statistics

    def full(file, *_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(statistics, "write_statistics", full)
    outcome = run("score", drawn, "--inception", "w.pth", "--save", tmp_path / "s.npz")
    assert outcome.code == 2
    assert "no space left" in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]
