"""``--json``: stdout holds one JSON object and nothing else, whatever libraries print meanwhile."""

from __future__ import annotations

import json

import pytest
from conftest import MODEL


@pytest.mark.parametrize("arguments", [["models"], ["doctor"], ["inspect", "{toy}"], ["generate", "{toy}", "--n", "1"]])
def test_one_object_on_stdout(spawn, toy, tmp_path, arguments):
    outcome = spawn(*(part.format(toy=toy) for part in arguments), "--json", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert isinstance(json.loads(outcome.out), dict)
    assert outcome.err == ""


def test_what_libraries_print_goes_to_stderr(run, toy, tmp_path, monkeypatch):
    import qexport.runtime

    load = qexport.runtime.load

    def chatty(*arguments, **options):
        print("a library says something")
        return load(*arguments, **options)

    monkeypatch.setattr(qexport.runtime, "load", chatty)
    outcome = run("generate", toy, "--n", "1", "--out", tmp_path / "a.png", "--json")
    assert json.loads(outcome.out)["out"] == str(tmp_path / "a.png")
    assert "a library says something" in outcome.err


def test_errors_leave_stdout_empty(run, tmp_path):
    for arguments in (["inspect", tmp_path], ["generate", tmp_path], ["quantize", "--model", "nope"]):
        outcome = run(*arguments, "--json")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.error.startswith("error: ")


def test_models(run):
    models = {row["name"]: row for row in json.loads(run("models", "--json").out)["models"]}
    assert models[MODEL]["bundled"]
    assert models[MODEL]["missing"] == []
    assert models["var-d16"]["files"] == ["var_d16.pth", "vae_ch160v4096z32.pth"]
    assert all(row["licence"] and row["source"] and row["parameters"] for row in models.values())


def test_models_knows_what_is_here(run, tmp_path, monkeypatch):
    monkeypatch.setenv("QEXPORT_CHECKPOINTS", str(tmp_path))
    (tmp_path / "var_d16.pth").write_bytes(b"")
    models = {row["name"]: row for row in json.loads(run("models", "--json").out)["models"]}
    assert models["var-d16"]["missing"] == ["vae_ch160v4096z32.pth"]
    (tmp_path / "vae_ch160v4096z32.pth").write_bytes(b"")
    lines = run("models").out.splitlines()
    assert "here" in next(line for line in lines if line.startswith("var-d16 "))
    assert "to fetch" in next(line for line in lines if line.startswith("var-d20 "))


def test_doctor_passes_here(run):
    data = json.loads(run("doctor", "--json").out)
    assert data["passed"]
    checks = {check["name"]: check for check in data["checks"]}
    assert checks["onnxruntime on the CPU"]["ok"]
    assert checks["the export toolchain"]["ok"]
    assert data["versions"]["torch"]
    assert data["cpu"]["usable"] >= 1


def test_doctor_says_what_does_not_work(run, monkeypatch):
    def broken(provider):
        raise ImportError("libsomething.so: cannot open shared object file")

    monkeypatch.setattr("qexport_cli.health._negate", broken)
    outcome = run("doctor")
    assert outcome.code == 1
    assert "libsomething.so" in outcome.out
