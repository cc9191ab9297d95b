"""`qexport scaling` as a user sees it: plans, refusals, a small sweep, what follows from a store."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "qexport" / "scaling"))

import made_up
import numpy as np

from qexport.scaling.grid import Measurement, Run, describe
from qexport.scaling.measure import Bench
from qexport.scaling.store import Store

SMALL = ("--models", "var-c10-d2", "--wbits", "2,16", "--formats", "int", "--methods", "rtn", "--fd", "0")


def test_a_plan_names_the_runs_and_what_is_left_out(run):
    outcome = run("scaling", "--wbits", "2,4,16", "--methods", "rtn,topkld", "--plan", "--json")
    plan = json.loads(outcome.out)
    assert outcome.code == 0
    assert len(plan["runs"]) == 6 * (1 + 2 * 2 + 1 * 2)
    assert {"what": "fp2", "reason": "fp has 4, 6, 8 bits"} in plan["left_out"]
    assert plan["measurement"]["fd"] == 500


def test_quick_is_small(run):
    plan = json.loads(run("scaling", "--quick", "--plan", "--json").out)
    assert len(plan["runs"]) == 4 * (4 * 2 + 1)
    assert {entry["model"] for entry in plan["runs"]} == {f"{f}-c10-d{d}" for f in ("var", "dit") for d in (2, 3)}
    assert plan["left_out"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--families", "var-c11"], "did you mean 'var-c10'"),
        (["--families", "var-c10", "--models", "var-c10-d2"], "leave one out"),
        (["--models", "var-c10-d9"], "var-c10-d9"),
        (["--wbits", "2,x"], "'x' is not a number of bits"),
        (["--wbits", "5"], "5 is no width"),
        (["--wbits", ","], "--wbits names nothing"),
        (["--formats", "float"], "--formats: 'float' is unknown"),
        (["--methods", "gtpq"], "did you mean 'gptq'"),
        (["--samples", "0"], "must be at least 1"),
        (["--fd", "1"], "at least 2"),
        (["--checkpoint", "var-c10-d2"], "write NAME=FILE"),
        (["--checkpoint", "var-c10-d2=missing.pt"], "missing.pt: no such file"),
        (["--images", "missing.npz"], "missing.npz: no such file"),
        (["--images", ".", "--quick"], "--images .: "),
        (["--budget", "much"], "not a size"),
        (["--budget", "3MB"], "no such store"),
        (["--from-store"], "no such store"),
        (["--jobs", "0"], "--jobs 0"),
        (["--inception", "w.pth"], "--inception needs --reference"),
        (["--reference", "r.npz"], "--reference needs --inception"),
        (["--inception", "w.pth", "--reference", "r.npz"], "--inception w.pth: no such file"),
    ],
)
def test_what_makes_no_sense_is_one_line(run, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    outcome = run("scaling", *arguments)
    assert outcome.code == 2
    assert says in outcome.error
    assert list(tmp_path.rglob("*.sqlite")) == []


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A made-up sweep of two series; the fewer the bits the smaller the loss of the larger model."""
    path = tmp_path_factory.mktemp("store") / "runs.sqlite"
    chosen = made_up.selection(
        lambda series, parameters, bits, method: 10 - np.log2(parameters) / 4 + 0.1 * (16 - bits) / 14,
        series=("dit-c10", "var-c10"),
    )
    with Store(path) as opened:
        for row in chosen.rows.values():
            opened.record(row.key, row.run, row.measured, environment=row.environment, version="0", wall_s=1)
    return path


def test_results_are_written_from_a_store(run, store, tmp_path):
    outcome = run("scaling", "--from-store", "--store", store, "--out", tmp_path / "out", "--report", tmp_path / "r.md")
    assert outcome.code == 0, outcome.err
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert {row["cross_entropy"] == "" for row in rows if row["series"] == "dit-c10"} == {True}
    plots = sorted(path.name for path in (tmp_path / "out" / "plots").iterdir())
    assert "var-c10-cross_entropy.svg" in plots
    assert "dit-c10-fd.png" in plots
    assert "dit-c10-loss-compute_bits.svg" in plots
    assert "fd-compute_bits.svg" in plots
    page = (tmp_path / "out" / "index.html").read_text()
    for fetched in ('src="', "<link", "@import", "url(http"):
        assert fetched not in page
    assert "<svg" in page
    assert "var-c10-d3" in page
    report = (tmp_path / "r.md").read_text()
    assert "qexport scaling --models" in report
    assert "Best width, var-c10" in report
    assert "Best width at equal compute bits, var-c10" in report
    assert "dit-c10 or var-c10, at equal compute bits" in page
    assert not list(tmp_path.rglob(".*partial*"))
    again = run("scaling", "--from-store", "--store", store, "--out", tmp_path / "again")
    assert again.code == 0
    for name in ("results.csv", "index.html", "plots/var-c10-fd.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_budget_has_one_answer_a_series(run, store):
    # 2 bits of d4 (1 MB) beat all that is as small: 0.5 per doubling of parameters against 0.1 of bits.
    outcome = run("scaling", "--budget", "1MB", "--store", store, "--json")
    answers = json.loads(outcome.out)["answers"]
    assert [(a["model"], a["format"]) for a in answers] == [("dit-c10-d4", "int2"), ("var-c10-d4", "int2")]
    assert answers[1]["size_bytes"] == 1e6
    assert answers[1]["command"] == "qexport quantize --model var-c10-d4 --wbits 2"
    assert "is worse" in answers[1]["words"]
    small = json.loads(run("scaling", "--budget", "100kB", "--store", store, "--json").out)["answers"]
    assert [(a["model"], a["least_bytes"]) for a in small] == [(None, 250000), (None, 250000)]
    shown = run("scaling", "--budget", "1MB", "--store", store)
    assert "var-c10-d4" in shown.out
    assert "qexport quantize --model var-c10-d4 --wbits 2" in shown.out


@pytest.mark.parametrize(
    ("chosen", "seed"),
    [
        (Run("var-c10-d2", "int2", "topkld"), 0),
        (Run("var-c10-d2", "int3", "topkld"), 5),
        (Run("dit-c10-d2", "int4", "topkld"), 5),
        (Run("var-c10-d5", "int8", "gptq"), 0),
        (Run("dit-c10-d5", "int6", "rtn"), 5),
        (Run("var-c10-d2", "fp8-e4m3", "gptq"), 0),
        (Run("var-c10-d2"), 5),
    ],
    ids=str,
)
def test_the_recommended_command_has_the_settings_of_its_run(run, monkeypatch, tmp_path, chosen, seed):
    """What the sweep asked of the run, and what `qexport quantize` makes of the printed command."""
    how = Measurement(images_sha256="0", seed=seed)
    bench = object.__new__(Bench)  # no model is needed to say how one is trained
    bench.how = how
    row = made_up.row(chosen, 1.0, parameters=1e6, bits=4)
    settings = {**row.settings, "measurement": describe(how), "checkpoints": {"model": "0f8c"}}
    wanted = bench._training()
    if chosen.trained:
        settings["training"] = {"start_method": "gptq", "settings": wanted.to_json()}
    path = tmp_path / "runs.sqlite"
    with Store(path) as opened:
        measured = replace(row.measured, settings=settings)
        opened.record(row.key, chosen, measured, environment={}, version="0", wall_s=1)
    weights = tmp_path / "d5 of mine.safetensors"
    weights.touch()
    given = ("--checkpoint", f"{chosen.model}={weights}") if chosen.model.endswith("d5") else ()
    (answer,) = json.loads(run("scaling", "--budget", "9MB", "--store", path, "--json", *given).out)["answers"]
    asked = {}
    monkeypatch.setattr("qexport.pipeline.quantize", lambda model, **rest: asked.update(rest, model=model))
    monkeypatch.setattr("qexport_cli.quantize.speaks", lambda: False)
    words = shlex.split(answer["command"])
    assert words[0] == "qexport"
    outcome = run(*words[1:])
    assert outcome.code == 0, outcome.err
    assert asked["model"] == chosen.model
    assert asked["checkpoint"] == (str(weights) if given else None)
    assert bool(answer["weights"]) is bool(given)
    request = asked["request"]
    assert (request.scheme.weight, request.scheme.activation) == (chosen.scheme.weight, chosen.scheme.activation)
    assert request.samples is None
    if chosen.trained:
        # How often a checkpoint is written decides nothing; all else does.
        assert replace(asked["training"].settings, checkpoint_every=1) == replace(wanted, checkpoint_every=1)
        assert asked["training"].data is None
        assert request.method.name == "gptq"
    else:
        assert asked["training"] is None
        assert request.method.name == (chosen.method if chosen.method != "none" else "rtn")
    if chosen.method != "none":
        assert request.seed == seed


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(run, monkeypatch, store, tmp_path, width):
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in (["--from-store", "--out", tmp_path], ["--budget", "1MB"], ["--budget", "100kB"]):
        outcome = run("scaling", "--store", store, *arguments)
        lines = [line for line in outcome.out.splitlines() if not line.startswith(("wrote", "qexport"))]
        assert max(map(len, lines)) <= width


@pytest.mark.slow
def test_a_small_sweep_resumes(run, tmp_path):
    out = ("--samples", "4", "--out", tmp_path)
    first = json.loads(run("scaling", *SMALL, *out, "--json").out)
    assert (first["made"], first["found"], first["failed"]) == (2, 0, {})
    values = {entry["format"]: entry["figures"]["kl"]["value"] for entry in first["runs"]}
    assert values["fp16"] < 1e-6 < 0.1 < values["int2"]
    second = json.loads(run("scaling", *SMALL, *out, "--json").out)
    assert (second["made"], second["found"]) == (0, 2)
    assert second["runs"] == first["runs"]
