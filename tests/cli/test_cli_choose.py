"""`qexport quantize --compare` and `--method auto` from end to end: what they print, write, and leave in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MODEL

from qexport.bundle import Bundle
from qexport.recipe_toml import read_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BUDGET = 4.5


def report_of(run, out: Path) -> str:
    outcome = run("verify", out, "--samples", 1, "--batch", 1)
    assert outcome.code == 0, outcome.err
    return (out / "reports" / "verify.html").read_text(encoding="utf-8")


def test_compare_prints_its_table_and_the_report_has_it(run, tmp_path):
    out = tmp_path / "out"
    outcome = run("quantize", "--model", MODEL, "--wbits", 3, "--compare", "rtn,mse", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    written = json.loads((out / "reports" / "compare.json").read_text())
    rows = {row["method"]: row for row in written["rows"]}
    assert list(rows) == ["rtn", "mse"]
    assert rows["mse"]["kl"] < rows["rtn"]["kl"]
    assert written["chosen"] == "mse"

    lines = [line.split() for line in outcome.out.splitlines()]
    (rtn,), (mse,) = ([line for line in lines if line[:1] == [name]] for name in rows)
    assert mse[1] == "←"
    assert float(rtn[1]) == pytest.approx(rows["rtn"]["kl"], rel=1e-3)
    assert float(mse[2]) == pytest.approx(rows["mse"]["kl"], rel=1e-3)
    assert Bundle.open(out, "full").manifest.scheme == "w3a16-mse"
    assert {row["algorithm"] for row in Bundle.open(out).manifest.layers} == {"mse", None}

    html = report_of(run, out)
    assert "<h2>Methods compared: w3a16</h2>" in html
    assert "<code>mse</code> ←" in html
    for row in rows.values():
        assert f"<span class=n>{row['kl']:.3g}</span>" in html


def test_auto_writes_recipe_plot_and_bundle_within_the_budget(run, tmp_path):
    out = tmp_path / "out"
    outcome = run(
        "quantize", "--model", MODEL, "--method", "auto", "--target-bits", BUDGET, "--calibration-samples", 4,
        "--out", out, "--json",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    figures = json.loads(outcome.out)
    assert BUDGET - 0.5 < figures["bits_per_weight_quantized"] <= BUDGET
    bundle = Bundle.open(out, "full")

    recipe = read_recipe(out / "recipe.toml")
    chosen = figures["sensitivity"]["chosen"]
    assert {rule.layers: str(rule.weight) for rule in recipe.rules} == chosen
    assert {
        row["name"]: f"{row['format']} {row['granularity']}" for row in bundle.manifest.layers if row["algorithm"]
    } == (chosen)
    assert len(set(chosen.values())) > 1  # mixed
    assert {rule.algorithm for rule in recipe.rules} == {"gptq"}
    costs = {(row["layer"], row["format"]): row["cost"] for row in figures["sensitivity"]["rows"]}
    assert all(costs[layer, "int2"] > costs[layer, "int8"] for layer in chosen)

    plot = (out / "reports" / "sensitivity.svg").read_text(encoding="utf-8")
    assert plot.count("<svg") == 1
    assert "KL to full precision" in plot or "<path" in plot

    html = report_of(run, out)
    assert "<h2>Sensitivity of the layers</h2>" in html
    assert html.count('src="data:image/svg+xml;base64,') == 1

    again = run("quantize", "--model", MODEL, "--recipe", out / "recipe.toml", "--out", tmp_path / "again")
    assert again.code == 0
    assert Bundle.open(tmp_path / "again").manifest.files == bundle.manifest.files  # what was written can be replayed
