"""Help and usage errors: at once, without the heavy libraries, and in one line."""

from __future__ import annotations

import pytest

COMMANDS = (
    "scaling",
    "score",
    "models",
    "quantize",
    "verify",
    "generate",
    "inspect",
    "lower",
    "ship",
    "serve",
    "doctor",
    "bench",
)
HEAVY = {"torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "matplotlib", "numpy", "PIL"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(spawn, arguments):
    report = f"import atexit, sys; atexit.register(lambda: print('HEAVY', *({HEAVY} & set(sys.modules))))"
    outcome = spawn(*arguments, before=report)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.splitlines()[-1] == "HEAVY"


def test_help_names_every_command(run):
    outcome = run("--help")
    assert outcome.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in outcome.out


def test_no_arguments_show_the_help(run):
    assert run() == run("--help")


def test_the_list_of_commands_fits_eighty_columns_whole(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in run("--help").out.partition("Commands:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_fits_eighty_columns(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run(name, "-h")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "frobnicate"),
        (["quantise"], "quantize"),
        (["quantize", "--modle", "x"], "--model"),
        (["quantize", "--model", "x", "--wbits", "four"], "--wbits"),
        (["models", "surplus"], "surplus"),
        (["generate"], "BUNDLE"),
        (["generate", "x", "--n", "0"], "--n"),
        (["generate", "x", "--seed", "-1"], "--seed"),
        (["verify", "x", "--max-kl", "much"], "--max-kl"),
    ],
)
def test_wrong_usage_is_one_line(run, arguments, says):
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.error.startswith("error: ")
    assert says in outcome.error
    assert "--help" in outcome.error
