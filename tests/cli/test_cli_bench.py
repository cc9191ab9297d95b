"""`qexport bench`: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import shutil

import pytest


def test_json_and_report_are_the_same(run, var, tmp_path):
    path = shutil.copytree(var, tmp_path / "bundle")
    quick = ("--batch", "1", "--runs", "1", "--warm-up", "0", "--threads", "1", "--provider", "cpu", "--calls", "1")
    outcome = run("bench", path, *quick, "--against", "none", "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    assert data == json.loads((path / "reports/bench.json").read_text())
    assert data["contenders"][0]["batches"]["1"]["latency_ms"]["total"]["runs"] == 1

    words = run("bench", path, *quick, "--against", "none").out
    assert "not measured on CUDA" in words
    assert "above an empty process" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "1,x"), "write whole numbers"),
        (("--batch", "0"), "from 1 on"),
        (("--against", "fp64"), "unknown reference 'fp64'"),
        (("--out", "x.json"), "--calibrate-device"),
        (("--calibrate-device",), "leave the bundle out"),
        (("--target", "ort-cuda"), "not lowered to 'ort-cuda'"),
    ],
)
def test_refusals_are_one_line(run, var, arguments, words):
    outcome = run("bench", var, *arguments)
    assert outcome.code == 2
    assert words in outcome.error
