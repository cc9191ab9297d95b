"""From files and plug-ins through quantize, verify, inspect and generate: what is said about the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from qexport_cli.quantize import _announce
from support import CHECKPOINTS

from qexport.family import find_model

RANDOM = "random weights, seed 5: not a model"


def test_a_plugged_in_family_through_every_command(run, installed, ink_file, tmp_path):
    bundle = tmp_path / "bundle"
    made = run("quantize", "--checkpoint", ink_file, "--wbits", 4, "--out", bundle)
    assert (made.code, made.err) == (0, "recognised: ink-8\n")
    verified = run("verify", bundle, "--checkpoint", ink_file, "--samples", 4, "--json")
    data = json.loads(verified.out)
    assert (verified.code, data["passed"]) == (0, True), verified.err
    assert [rung["name"] for rung in data["skipped"]] == ["quality"]
    assert "neither draws tokens nor denoises" in data["skipped"][0]["reason"]
    drawn = run("generate", bundle, "--n", 5, "--out", tmp_path / "ink.png")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "ink.png").is_file()
    assert "ink-8 " in run("models").out


def test_random_weights_are_marked_wherever_they_are_seen(run, installed, tmp_path):
    bundle = tmp_path / "bundle"
    made = run("quantize", "--model", "ink-8", "--random-weights", 5, "--out", bundle)
    assert (made.code, made.err) == (0, f"warning: {RANDOM}\n")
    page, picture = tmp_path / "page.html", tmp_path / "x.png"
    commands = (
        ("verify", bundle, "--samples", 2, "--html", page),
        ("inspect", bundle),
        ("generate", bundle, "--n", 2, "--out", picture),
    )
    for outcome in (made, *(run(*command) for command in commands)):
        assert outcome.code == 0, outcome.err
        assert RANDOM in outcome.out
    assert RANDOM in page.read_text(encoding="utf-8")
    assert RANDOM.encode() in picture.read_bytes()
    assert json.loads(run(*commands[0], "--json").out)["source"] == RANDOM
    assert json.loads(run(*commands[1], "--json").out)["model"]["source"] == RANDOM
    assert json.loads(run(*commands[2], "--json").out)["source"] == RANDOM


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say which model"),
        (["--random-weights", "5"], "--random-weights needs --model"),
        (["--model", "var-c10-d2", "--random-weights", "5", "--checkpoint", "x"], "it stands for the file"),
        (["--model", "var-c10-d2", "--random-weights", "-5"], "the seed must be 0 or greater"),
    ],
)
def test_what_says_no_model(run, arguments, says):
    outcome = run("quantize", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.error


@pytest.mark.slow
def test_a_renamed_file_without_a_name(run, tmp_path):
    copy = shutil.copy(CHECKPOINTS / "var-c10-d2.safetensors", tmp_path / "mine.bin")
    made = run("quantize", "--checkpoint", copy, "--out", tmp_path / "bundle", "--json")
    assert (made.code, made.err) == (0, "recognised: var-c10-d2\n")
    assert json.loads(made.out)["model"] == "var-c10-d2"
    verified = run("verify", tmp_path / "bundle", "--checkpoint", copy, "--samples", 1, "--json")
    assert verified.code == 0, verified.err
    assert [rung for rung in json.loads(verified.out)["skipped"] if not rung["name"].startswith("speed")] == []


def test_a_licence_that_restricts_is_said(capsys):
    entry = find_model("dit-xl-2-256")[1]
    _announce(entry, recognised=True)
    assert capsys.readouterr().err == (
        "recognised: dit-xl-2-256\nlicence of dit-xl-2-256: CC-BY-NC-4.0: non-commercial use only, of the weights and "
        "of what is made from them\n"
    )
    _announce(replace(entry, licence="MIT"), recognised=False)
    assert capsys.readouterr().err == ""
