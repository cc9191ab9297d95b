"""`qexport lower`: what it prints, and how it refuses."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def bundle(var, tmp_path):
    return shutil.copytree(var, tmp_path / "bundle")


def test_json_has_the_report(run, bundle):
    outcome = run("lower", bundle, "--target", "ort-cuda", "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    assert (data["target"], data["dtype"]) == ("ort-cuda", "float16")
    assert data["graphs"]["step"]["attention without transposes"] == {"rewritten": 2, "refused": {}}
    assert data["added_bytes"] == sum((bundle / file).stat().st_size for file in data["files"])
    assert json.loads((bundle / "reports/lower-ort-cuda.json").read_text()) == data


def test_words_say_what_was_done_and_what_was_not(run, bundle):
    outcome = run("lower", bundle)
    assert outcome.code == 0
    assert "attention without transposes" in outcome.out
    assert "it has a cache or a mask (2)" in outcome.out
    assert "not measured on CUDA" in outcome.out


def test_reasons_are_whole_at_eighty_columns(run, bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run("lower", bundle)
    assert "…" not in outcome.out
    assert "it has a cache or a mask (2)" in " ".join(outcome.out.split())
    assert run("inspect", bundle).out.count("ort-cuda") == 1


def test_a_decoder_in_float16_says_how_far_it_goes(run, bundle):
    outcome = run("lower", bundle, "--decoder-dtype", "float16")
    assert outcome.code == 0
    assert "float16; reaches " in outcome.out
    assert " of 8,188 at decoder." in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "tensorrt"), "--group-size 128"),
        (("--target", "ort-cud"), "did you mean 'ort-cuda'"),
        (("--target", "ort-cpu", "--dtype", "float16"), "float32, not in float16"),
        (("--target", "ort-cpu", "--decoder-dtype", "float16"), "decoders of ort-cpu compute in float32"),
    ],
)
def test_refusals_are_one_line(run, bundle, arguments, words):
    outcome = run("lower", bundle, *arguments)
    assert outcome.code == 2
    assert words in outcome.error


def test_no_bundle(run, tmp_path):
    outcome = run("lower", tmp_path / "nothing")
    assert outcome.code == 2
    assert "no such folder" in outcome.error
