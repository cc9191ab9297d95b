"""`bench` on a small bundle: who takes part, what is said of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qexport.bench.contender import Contender, Settings
from qexport.bench.process import Held, Racer, stop_all
from qexport.bench.report import Batch, BenchReport, Row
from qexport.bench.run import bench
from qexport.bench.timing import Turns, race
from qexport.errors import BundleError, InputError
from qexport.lower.work import plan_work
from qexport.targets import QuantTraits, session_config

QUICK = {"batches": (1,), "runs": 3, "warm_up": 0, "threads": 1, "provider": "cpu", "calls": 2}


def test_a_bundle_beside_its_twin(w4_bundle, tmp_path):
    path = shutil.copytree(w4_bundle.path, tmp_path / "bundle")
    report = bench([path], against=("fp32",), **QUICK)
    ours, twin = report.rows
    assert (ours.contender.name, twin.contender.name) == ("w4a16", "fp32")
    assert ours.contender.file_bytes is not None
    assert twin.contender.file_bytes is not None
    assert 1.5 * ours.contender.file_bytes < twin.contender.file_bytes  # half of the small model is its decoder
    for row in report.rows:
        assert row.failed is None
        spread = row.batches[1].spreads["total"]
        assert 0 < spread.least <= spread.quarter <= spread.median <= spread.three_quarters <= spread.greatest
        assert spread.runs == 3
        assert row.held.session is not None
        assert row.held.session > 1_000_000
    ratio = ours.batches[1].ratios["fp32"].median
    back = twin.batches[1].ratios
    assert ratio > 0
    assert back == {}
    written = json.loads((path / "reports/bench.json").read_text())
    assert written["contenders"][0]["name"] == "w4a16"
    assert "not measured on CUDA" in written["words"]
    assert written["settings"]["played"] == "the first 2 calls of graphs"


def test_whole_images_have_rooflines(w4_bundle, tmp_path):
    path = shutil.copytree(w4_bundle.path, tmp_path / "bundle")
    report = bench([path], against=(), reports=False, **{**QUICK, "calls": None, "runs": 1})
    lines = report.rows[0].batches[1].rooflines
    assert set(lines) == {"step", "decode"}
    assert all(line.flops > 1e8 and line.bytes > 1e6 and line.share > 0 for line in lines.values())
    assert not (path / "reports").exists()


def test_the_calls_that_are_played_have_rooflines(w4_bundle):
    """Work and floor are those of the calls, not of whole images: a share of the time of two calls would exceed 1."""
    report = bench([w4_bundle.path], against=(), reports=False, **{**QUICK, "runs": 1})
    lines = report.rows[0].batches[1].rooflines
    assert set(lines) == {"step"}  # the decoder was not played
    assert lines["step"].flops == plan_work(w4_bundle, 1, calls=2)["step"].flops
    assert lines["step"].flops < plan_work(w4_bundle, 1)["step"].flops / 5
    assert lines["step"].share > 0


def test_fixed_addresses_take_part(w4_bundle):
    """The contender that is a CUDA graph on CUDA; here its buffers are fixed and nothing is captured."""
    config = session_config("cpu", "serve", QuantTraits(weight_only=frozenset({"int4"})))
    files = w4_bundle.graph_files()
    configs = dict.fromkeys(files, config)
    one = Contender("captured", w4_bundle.path, w4_bundle.path, files, configs, captured=True)
    racers = [Racer(one, Settings(threads=1))]
    try:
        turns = race(racers, 2, warm_up=1, runs=2)
    finally:
        stop_all(racers)
    assert racers[0].failed is None
    assert turns.spread("captured", "total").runs == 2
    assert one.optional


def test_an_altered_bundle_is_not_measured(w4_bundle, tmp_path):
    path = shutil.copytree(w4_bundle.path, tmp_path / "bundle")
    graph = path / "step.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    with pytest.raises(BundleError, match=r"step\.onnx: altered"):
        bench([path], against=(), reports=False, **QUICK)


def test_a_contender_that_cannot_load_is_out_and_says_why(w4_bundle, tmp_path):
    damaged = tmp_path / "step.onnx"
    damaged.write_bytes(b"no graph")
    files = {**w4_bundle.graph_files(), "step": damaged}
    config = session_config("cpu", "serve", QuantTraits())
    contender = Contender("damaged", w4_bundle.path, tmp_path, files, dict.fromkeys(files, config))
    racers = [Racer(contender, Settings(threads=1))]
    try:
        turns = race(racers, 1, warm_up=0, runs=2)
    finally:
        stop_all(racers)
    assert "cannot load this graph" in str(racers[0].failed)
    assert not turns.seconds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batches": (0,)}, "batch is 0"),
        ({"runs": 0}, "runs is 0"),
        ({"against": ("fp64",)}, "unknown reference 'fp64'"),
        ({"targets": ("ort-cuda",)}, "not lowered to 'ort-cuda'"),
        ({"warm_up": -1}, "0 or more"),
    ],
)
def test_refusals(w4_bundle, change, words):
    with pytest.raises(InputError, match=words):
        bench([w4_bundle.path], **{**QUICK, "against": (), "reports": False, **change})


def made_up(ours_ms: list[float], fp32_ms: list[float]) -> BenchReport:
    turns = Turns(1)
    for name, values in (("w8a8", ours_ms), ("fp32", fp32_ms)):
        turns.seconds[name] = [{"total": ms / 1e3} for ms in values]
    rows = []
    for name in turns.seconds:
        contender = Contender(name, Path(), Path(), reference=name == "fp32")
        ratios = {} if name == "fp32" else {"fp32": turns.ratio("fp32", name, "total")}
        batch = Batch({"total": turns.spread(name, "total")}, None, ratios)
        rows.append(Row(contender, 0.1, Held(None, None, None), {1: batch}))
    return BenchReport(rows, {"provider": "cuda"}, {})


def test_slower_is_said_in_words():
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.2, 0.2, 20)
    slower = made_up(list(12 + noise), list(10 - noise)).words()
    assert slower == ["w8a8 is slower than fp32 at batch 1: 12 ms, fp32 9.97 ms (0.83 times as fast)"]
    assert made_up([12, 12], [10, 10]).words() == []  # two turns prove nothing
    assert made_up(list(8 + noise), list(10 + noise)).words() == []
    assert made_up(list(10 + noise), list(10 - noise)).words() == []  # on both sides of 1: nothing is claimed
