"""`qexport ship`: what it writes, and what it refuses. The files themselves: tests/qexport/ship."""

from __future__ import annotations

import json

import pytest


def test_one_file(run, toy, tmp_path):
    out = tmp_path / "new" / "toy.onnx"
    outcome = run("ship", toy, out, "--to", "onnx", "--json")
    facts = json.loads(outcome.out)
    assert (outcome.code, facts["files"], facts["calls"]) == (0, [str(out)], 6)
    assert facts["size_bytes"] == out.stat().st_size
    assert facts["noise"] == {"z": 2, "u": 12}
    assert "pass --overwrite" in run("ship", toy, out, "--to", "onnx").error
    assert run("ship", toy, out, "--to", "onnx", "--overwrite").code == 0


def test_words_of_one_file(run, toy, tmp_path):
    out = run("ship", toy, tmp_path / "toy.onnx", "--to", "onnx").out
    assert "z: 2 numbers an image, u: 12 numbers an image" in out
    assert "{" not in out


def test_a_repository(run, toy, tmp_path):
    out = tmp_path / "repository"
    outcome = run("ship", toy, out, "--to", "triton", "--name", "it", "--json")
    facts = json.loads(outcome.out)
    assert facts["models"] == ["it", "it_step", "it_drift", "it_decode"]
    assert {path.name for path in out.iterdir()} == {*facts["models"], "README.md"}
    assert "bundle_drift" in run("ship", toy, tmp_path / "second", "--to", "triton").out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "tritn"], "did you mean 'triton'"),
        (["--to", "onnx"], "must end in .onnx"),
        (["--to", "triton", "--schedule", "ddim-25"], "unknown schedule"),
        ([], "--to"),
    ],
)
def test_wrong_usage(run, toy, tmp_path, arguments, says):
    outcome = run("ship", toy, tmp_path / "out", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_no_bundle(run, tmp_path):
    assert "no such folder" in run("ship", tmp_path / "missing", tmp_path / "x.onnx", "--to", "onnx").error


@pytest.mark.parametrize("name", ["serve", "ship"])
def test_help_imports_nothing_heavy(spawn, name):
    heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "PIL", "fastapi", "uvicorn"}
    report = f"import atexit, sys; atexit.register(lambda: print('HEAVY', *({heavy} & set(sys.modules))))"
    outcome = spawn(name, "--help", before=report, COLUMNS="80")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == "HEAVY"
    assert max(map(len, outcome.out.splitlines())) <= 80
