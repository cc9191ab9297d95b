"""The report: its command asks for the runs it reports, and sentences that are not shown are marked."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import made_up
from qexport_cli.main import app
from typer.testing import CliRunner

from qexport.scaling.findings import findings, laws_of
from qexport.scaling.report import command_of, how_measured, markdown, run_table


def value(series, parameters, bits, method):
    return 10 - math.log2(parameters) / 4 + 0.1 * (16 - bits)


def test_the_command_stands_for_the_runs():
    """Planned by the command line itself, it gives the grid that is reported."""
    chosen = made_up.selection(value, methods=("rtn", "gptq"))
    words = [word for word in command_of(chosen).split()[1:] if word not in ("--images", "FILE")]
    planned = json.loads(CliRunner().invoke(app, [*words, "--plan", "--json"]).stdout)
    assert {(r["model"], r["format"], r["method"]) for r in planned["runs"]} == {
        (run.model, run.number_format, run.method) for run in chosen.rows
    }
    for name in ("judged_tokens", "judged_latents", "fd", "seed", "drawn", "trajectories"):
        assert planned["measurement"][name] == chosen.measurement[name], name
    assert "--quick" not in command_of(chosen)
    quick = replace(chosen, measurement={**chosen.measurement, "drawn": 16, "trajectories": 10})
    words = [word for word in command_of(quick).split()[1:] if word not in ("--images", "FILE")]
    planned = json.loads(CliRunner().invoke(app, [*words, "--plan", "--json"]).stdout)
    assert planned["measurement"]["drawn"] == 16


def test_what_is_not_shown_is_set_apart():
    chosen = made_up.selection(value)
    found = findings(laws_of(chosen))
    text = markdown(chosen, found, {})
    for item in found:
        assert (f"- {item.text}\n" in text) is item.shown
        assert (f"- *{item.text}*\n" in text) is not item.shown
    assert {item.shown for item in found} == {True, False}
    assert command_of(chosen) in text
    assert all(sentence in text for sentence in how_measured(chosen))


def test_every_run_has_its_line():
    chosen = made_up.selection(value)
    lines = run_table(list(chosen.rows.values()))
    assert len(lines) == 2 + len(chosen.rows)
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    row = next(row for run, row in chosen.rows.items() if run.number_format == "int3")
    (line,) = [line for line in lines if f"| {row.run.model} | int3 |" in line]
    assert f"{row.measured.figures['cross_entropy']['value']:.4g} (" in line
