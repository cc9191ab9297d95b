"""A `qexport quantize` that is killed half way through calibration: the next goes on, and ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from importlib import import_module
from pathlib import Path

import pytest
from conftest import MODEL, command

from qexport.bundle import Bundle

STAGES = 4
"""Of var-c10-d2: embedding, two blocks, head."""

PATIENCE_S = 600

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""The same bits are promised for the same number of threads only."""


def arguments(out: Path) -> list[object]:
    return ["quantize", "--model", MODEL, "--wbits", 4, "--method", "gptq", "--calibration-samples", 16, "--out", out]


def finished(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/stage-*.safetensors"))


def stamps_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*/stage-*.safetensors")}


def test_killed_after_its_first_stage_it_goes_on_and_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*arguments(whole)).code == 0
    work = tmp_path / ".out.calibration"
    child = subprocess.Popen(command(*arguments(out)), env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE_S
    while not finished(work):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    kept = finished(work)
    assert 1 <= len(kept) < STAGES
    assert not out.exists()
    stamps = stamps_of(work)

    solver, solved = import_module("qexport.solve.solver"), []
    stage = solver.solve_stage

    def counted(*given: object) -> object:
        assert stamps_of(work).items() >= stamps.items()  # what was there is not written again
        solved.append(given)
        return stage(*given)

    monkeypatch.setattr(solver, "solve_stage", counted)
    outcome = run(*arguments(out))
    assert outcome.code == 0, outcome.err
    assert len(solved) == STAGES - len(kept)
    assert not work.exists()
    assert Bundle.open(out, "full").manifest.digest == Bundle.open(whole).manifest.digest
    for path in whole.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == sorted(p.relative_to(whole) for p in whole.rglob("*"))
