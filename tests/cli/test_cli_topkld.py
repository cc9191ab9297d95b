"""`qexport quantize --topkld`: what is refused, and what is said of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL
from qexport_cli.quantize_choice import choose

from qexport.bundle import Bundle
from qexport.errors import InputError

DIT = "dit-c10-d2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variant", "split"], "--variant belongs to --topkld, which fine-tunes; add --topkld or leave it out"),
        (["--top-k", "10"], "--top-k belongs to --topkld"),
        (["--steps", "10"], "--steps belongs to --topkld"),
        (["--batch", "10"], "--batch belongs to --topkld"),
        (["--lr", "0.1"], "--lr belongs to --topkld"),
        (["--data", "folder"], "--data belongs to --topkld"),
        (["--topkld", "--variant", "splt"], "--variant 'splt' is unknown; did you mean 'split'"),
        (["--topkld", "--variant", "forward", "--top-k", "10"], "leave it out with --variant forward"),
        (["--topkld", "--top-k", "0"], "--top-k 0: must be at least 1"),
        (["--topkld", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--topkld", "--batch", "-1"], "--batch -1: must be at least 1"),
        (["--topkld", "--lr", "0"], "--lr 0.0: must be greater than 0"),
        (["--topkld", "--lr", "nan"], "--lr nan: must be greater than 0, and finite"),
        (["--topkld", "--wbits", "16"], "--topkld has no meaning with --wbits 16"),
        (["--topkld", "--data", "missing"], "missing: no such file or folder"),
        (["--topkld", "--data", "."], "has no subfolders"),
        (["--topkld", "--steps", "many"], "--steps"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    outcome = run("quantize", "--model", MODEL, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variant", "forward"], "--variant is about distributions of tokens"),
        (["--top-k", "10"], "--top-k is about distributions of tokens"),
        (["--data", "."], "--data .: dit-c10-d2 draws no tokens"),
    ],
)
def test_a_denoiser_has_no_choice_of_loss(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    outcome = run("quantize", "--model", DIT, "--topkld", *arguments)
    assert outcome.code == 2
    assert says in outcome.error
    assert not list(tmp_path.iterdir())


def test_what_options_mean(tmp_path):
    plain = choose({"--wbits": 2}, None)
    assert plain.training is None
    assert plain.request is not None
    assert plain.request.name == "w2a16"
    taught = choose({"--wbits": 2, "--seed": 3}, None, {"--topkld": True})
    assert taught.training is not None
    assert taught.request is not None
    assert (taught.request.name, taught.training.settings.seed, taught.training.loss_option) == ("w2a16-gptq", 3, "")
    settings = choose({}, None, {"--topkld": True, "--top-k": 7, "--steps": 9, "--lr": 0.5}).training.settings  # type: ignore[union-attr]
    assert (settings.loss.loss, settings.loss.top_k, settings.steps, settings.lr) == ("split", 7, 9, 0.5)
    other = choose({"--method": "mse"}, None, {"--topkld": True, "--variant": "js"})
    assert other.request is not None
    assert other.request.method.name == "mse"
    mixed = choose({"--method": "auto", "--target-bits": 3.0}, None, {"--topkld": True})
    assert mixed.request is not None
    assert mixed.request.name == "auto-3bits"

    recipe = tmp_path / "r.toml"
    recipe.write_text('version = 1\nname = "r"\n[calibration]\nsamples = 8\nseed = 5\n')
    read = choose({}, recipe, {"--topkld": True})
    assert read.training is not None
    assert read.training.settings.seed == 5  # the recipe's, as --seed is refused beside it
    with pytest.raises(InputError, match="leave --seed out"):
        choose({"--seed": 1}, recipe, {"--topkld": True})


@pytest.mark.slow
def test_a_run_on_images_and_what_is_said_of_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    np.savez("mine.npz", images=pixels, labels=np.arange(12) % 10)
    arguments = ("quantize", "--model", MODEL, "--wbits", "2", "--method", "mse", "--topkld", "--steps", "2")
    arguments += ("--batch", "4", "--data", "mine.npz", "--variant", "boosted", "--top-k", "50")
    outcome = run(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    name = f"{MODEL}-w2a16-mse-topkld"
    for part in (
        "KL, nats",
        "→",
        "on 2 held-out samples",
        "boosted, K 50, 2 steps of 4, from mse",
        "12 images of mine",
    ):
        assert part in outcome.out
    path = Path("qexport-out") / name
    assert sorted(entry.name for entry in Path("qexport-out").iterdir()) == [name]
    assert Bundle.open(path).manifest.training is not None

    again = run(*arguments)
    assert again.code == 2
    assert "exists" in again.error
    figures = json.loads(run(*arguments, "--overwrite", "--json").out)
    assert figures["scheme"] == "w2a16-mse-topkld"
    told = figures["training"]
    assert (told["method"], told["loss"], told["top_k"], told["boost"]) == ("topkld", "boosted", 50, 1.0)
    assert told["best"] <= told["start"]
    assert "losses" not in told
    assert len(json.loads((path / "reports" / "training.json").read_text())["losses"]) == 2
