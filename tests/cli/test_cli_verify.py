"""`qexport verify`: options reach the ladder, a breach is exit 1 and one line that says what and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from qexport_cli.verify import breach

GOOD = {"name": "step logits", "value": 1.5e-6, "limit": 2e-5, "passed": True, "unit": "", "where": "step[6]/logits"}
BAD = {
    "name": "quantised weights that differ", "value": 3.0, "limit": 0.0, "unit": "weights", "passed": False,
    "where": "step/blocks.0.ffn.fc1", "graph": "step", "node": "blocks.0.ffn.fc1", "detail": "codes differ",
}  # fmt: skip
LATENCY = {"batch_1": {"total": {"median": 12.5, "min": 12.0, "max": 14.0}, "step": {"median": 9.0}}, "runs": 5}


class Report:
    """What the ladder returns, as far as the command line looks at it."""

    def __init__(self, *checks: dict[str, Any]) -> None:
        self.checks = checks
        self.passed = all(check["passed"] for check in checks)
        self.skipped = [{"name": "FD", "reason": "not asked for"}]
        self.html: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": list(self.checks),
            "skipped": self.skipped,
            "quality": {"kl": 0.0347, "top1_agreement": 0.68, "n": 64, "seed": 0, "source": "64 samples"},
            "placement": {"serve": {"step": {"forms": {"MatMulNBits": 10}, "nodes": {"CPUExecutionProvider": 234}}}},
            "latency_ms": LATENCY,
            "bits_per_weight": 4.5,
            "size_bytes": 8_650_000,
            "peak_memory_bytes": None,
        }


@pytest.fixture
def ladder(monkeypatch):
    """Stand in for the ladder: answers with the report that was put in, and notes how it was called."""
    import qexport.verify.ladder

    notes: dict[str, Any] = {"report": Report(GOOD)}

    def verify(path, **options):
        notes.update(path=path, options=options)
        return notes["report"]

    monkeypatch.setattr(qexport.verify.ladder, "verify", verify)
    return notes


def test_good(run, ladder, toy):
    outcome = run("verify", toy)
    assert (outcome.code, outcome.err) == (0, "")
    for part in (
        "step logits", "1.5e-06", "2e-05", "✓", "kl 0.0347", "64 samples, seed 0", "MatMulNBits×10", "12.5",
        "skipped: FD: not asked for", "8.65 MB", f"{toy}: passed, 1 of 1 checks hold",
    ):  # fmt: skip
        assert part in outcome.out


def test_a_breach(run, ladder, toy):
    ladder["report"] = Report(GOOD, BAD)
    outcome = run("verify", toy)
    assert outcome.code == 1
    assert "✗" in outcome.out
    assert "FAILED, 1 of 2" in outcome.out
    assert outcome.error == (
        f"error: {toy}: quantised weights that differ, graph step, node blocks.0.ffn.fc1 is 3 weights, "
        "the limit is 0: codes differ"
    )
    in_json = run("verify", toy, "--json")
    assert in_json.code == 1
    assert json.loads(in_json.out)["passed"] is False


def test_a_breach_that_has_no_figure():
    check = {**BAD, "value": None, "graph": "", "node": "weights.data", "detail": "truncated"}
    assert (
        breach({"checks": [check, BAD]}) == "quantised weights that differ, node weights.data: truncated (and 1 more)"
    )


def test_a_breach_whose_detail_names_the_place_says_it_once():
    check = {**BAD, "name": "integrity", "value": None, "graph": "", "node": "b/w", "detail": "b/w: truncated"}
    assert breach({"checks": [check]}) == "integrity: b/w: truncated"


def test_options_reach_the_ladder(run, ladder, toy):
    run(
        "verify", toy, "--provider", "cpu", "--samples", 3, "--batch", 2, "--seed", 7, "--every", 5, "--quality",
        "--schedule", "ddim-25", "--target", "ort-cpu",
        "--images", "test.npz", "--fd-images", 50, "--max-kl", 0.5, "--max-fd", 9,
        "--checkpoint", "a", "--vae-checkpoint", "b",
    )  # fmt: skip
    progress = ladder["options"].pop("progress")
    assert callable(progress)
    assert ladder["path"] == toy
    assert ladder["options"] == {
        "provider": "cpu", "samples": 3, "batch": 2, "seed": 7, "schedule": "ddim-25", "target": "ort-cpu",
        "every": 5, "quality": True,
        "images": Path("test.npz"), "fd_images": 50, "extractor": None, "max_kl": 0.5, "max_fd": 9.0,
        "checkpoint": "a", "vae_checkpoint": "b",
    }  # fmt: skip


def test_the_newest_bundle(run, ladder, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no bundle under qexport-out" in run("verify").error
    shutil.copytree(toy, tmp_path / "qexport-out" / "mine")
    assert run("verify").code == 0
    assert ladder["path"] == Path("qexport-out/mine")


def test_a_report_to_a_place_that_cannot_be_written(run, ladder, toy, tmp_path):
    (tmp_path / "file").touch()
    for place, says in ((tmp_path, "is a folder"), (tmp_path / "file" / "report.html", "is a file, so nothing")):
        outcome = run("verify", toy, "--html", place)
        assert (outcome.code, "path" in ladder) == (2, False)
        assert says in outcome.error


def test_folders_above_a_report_are_made(run, ladder, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("qexport.verify.report_html.render", lambda report: "<!doctype html>")
    report = tmp_path / "new" / "er" / "report.html"
    assert run("verify", toy, "--html", report).code == 0
    assert report.read_text() == "<!doctype html>"


def test_only_a_report_of_this_run_is_named(run, ladder, toy, tmp_path):
    bundle = shutil.copytree(toy, tmp_path / "bundle")
    (bundle / "reports").mkdir(exist_ok=True)
    earlier = bundle / "reports" / "verify.html"
    earlier.write_text("of an earlier run")
    ladder["report"].skipped.append({"name": "report files", "reason": "reports: permission denied"})
    outcome = run("verify", bundle)
    assert outcome.error == "skipped: report files: reports: permission denied"
    assert "report: " not in outcome.out
    assert "skipped: FD" in outcome.out
    ladder["report"] = Report(GOOD)
    ladder["report"].html = earlier
    assert f"report: {earlier}" in run("verify", bundle).out


def test_no_bundle(run, tmp_path):
    outcome = run("verify", tmp_path / "missing")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no such folder" in outcome.error


@pytest.mark.slow
def test_a_real_bundle_and_a_damaged_one(run, var, tmp_path):
    report = tmp_path / "report.html"
    outcome = run("verify", var, "--samples", 2, "--html", report, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["passed"]
    assert report.read_text(encoding="utf-8").lstrip().startswith("<!")
    copy = tmp_path / "copy"
    shutil.copytree(var, copy)
    with (copy / "weights.data").open("r+b") as file:
        file.truncate(1000)
    damaged = run("verify", copy)
    assert damaged.code == 1
    assert damaged.error.startswith(f"error: {copy}: integrity: {copy / 'weights.data'}: truncated")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--inception", "w.pth", "--reference", "r.npz"], "pass that too"),
        (["--quality", "--inception", "w.pth"], "--inception needs --reference"),
        (["--quality", "--reference", "r.npz"], "--reference needs --inception"),
        (["--quality", "--inception", "w.pth", "--reference", "r.npz"], "r.npz: no such file"),
    ],
)
def test_inception_that_cannot_be_is_one_line(run, ladder, toy, arguments, says):
    outcome = run("verify", toy, *arguments)
    assert outcome.code == 2
    assert says in outcome.error
    assert "path" not in ladder


def test_inception_takes_the_place_of_the_models_features(run, ladder, toy, monkeypatch):
    from qexport.bundle import Bundle
    from qexport.verify import inception_run

    asked: list[Any] = []

    def opening(*given, **options):
        asked.extend(given)
        return "an extractor"

    monkeypatch.setattr(inception_run, "open_extractor", opening)
    assert run("verify", toy, "--quality", "--inception", "w.pth", "--reference", "r.npz").code == 0
    assert ladder["options"]["extractor"] == "an extractor"
    side = Bundle.open(toy).manifest.model.image_size
    assert asked == [Path("w.pth"), [Path("r.npz")], (side, side)]
    assert run("verify", toy, "--quality").code == 0
    assert ladder["options"]["extractor"] is None
