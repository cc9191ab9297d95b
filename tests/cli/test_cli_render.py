"""Tables fit the terminal, and figures read as they should."""

from __future__ import annotations

import pytest
from qexport_cli import render
from qexport_cli.render import Column, print_table


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("arguments", [["inspect", "{var}"], ["inspect", "{var}/step.onnx"], ["models"], ["doctor"]])
def test_nothing_is_wider_than_the_terminal(run, var, monkeypatch, columns, arguments):
    outcome = [run, monkeypatch.setenv("COLUMNS", str(columns))][0](*(part.format(var=var) for part in arguments))
    assert outcome.code == 0
    free = ("(QEXPORT_CHECKPOINTS", "files are looked for")  # lines to be copied are never broken
    lines = [line.rstrip() for line in outcome.out.splitlines() if not line.startswith(free)]
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in outcome.out


def test_long_names_lose_their_middle(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    print_table((Column("name", shorten=True), Column("n", right=True)), [("start" + "x" * 40 + "end", 12345)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert len(line) <= 30
    assert line.startswith("start")
    assert "…" in line
    assert line.endswith("end   12345")


def test_wide_columns_and_empty_ones_are_left_out(capsys, monkeypatch):
    columns = (Column("a"), Column("b", wide_only=True), Column("c"))
    note = "not shown: b (from 110 columns on, or with --json)"
    for width, heading, said in (("80", ["a"], True), ("120", ["a", "b"], False)):
        monkeypatch.setenv("COLUMNS", width)
        print_table(columns, [(1, 2, None)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == heading
        assert (note in lines) is said


def test_markup_in_names_is_not_interpreted(capsys):
    print_table((Column("name"),), [("[red]x[/red]",)])
    assert "[red]x[/red]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (render.size(0), "0 B"),
        (render.size(999), "999 B"),
        (render.size(1234), "1.23 kB"),
        (render.size(8_650_000), "8.65 MB"),
        (render.size(999_900), "1 MB"),
        (render.size(123_400_000), "123 MB"),
        (render.number(5_957_648), "5.96 M"),
        (render.number(12), "12"),
        (render.figure(0.00000144, 3), "1.44e-06"),
        (render.figure(2013.4, 3), "2013"),
        (render.figure(14.5937), "14.59"),
        (render.seconds(0.606), "0.606 s"),
        (render.seconds(200), "3 min 20 s"),
        (render.shape([128, 512]), "128×512"),
        (render.shape([]), "scalar"),
    ],
)
def test_figures(shown, expected):
    assert shown == expected


def test_json_has_no_nan(capsys):
    render.print_json({"a": float("nan"), "b": [float("inf"), (1, 2)]})
    assert capsys.readouterr().out == '{\n  "a": null,\n  "b": [\n    null,\n    [\n      1,\n      2\n    ]\n  ]\n}\n'
