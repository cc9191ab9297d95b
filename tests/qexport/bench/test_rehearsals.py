"""The rehearsals of the long tables, as a user would run them: small, on the CPU, to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def rehearsed(script: str, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a script of `benchmarks/`; its JSON and its table."""
    command = [sys.executable, str(BENCHMARKS / script), "--rehearse", *arguments, "--out", str(out / "table")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "table.json").read_text()), (out / "table.md").read_text()


@pytest.mark.slow
def test_the_cuda_table(tmp_path):
    """One forward of a denoiser, and whole images of a VAR: by ordinary sessions, and at fixed addresses."""
    report, table = rehearsed("cuda_table.py", tmp_path, "--no-torch", "--batches", "1", "--forms", "fp16")
    assert "not measured on CUDA" in report["device"]
    found = {(row["model"], row["form"]): row for row in report["rows"]}
    assert set(found) == {
        ("dit-c10-d2", "fp16"), ("var-c10-d2", "fp16"), ("var-c10-d2", "fp16, fixed buffers"),
    }  # fmt: skip
    for row in found.values():
        assert "failed" not in row
        assert row["batch"] == 1
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert {row["model"] for row in report["bundles"]} == {"dit-c10-d2", "var-c10-d2"}
    assert all(row["size_bytes"] > 1e6 and "default_failed" not in row for row in report["bundles"])
    assert sum(line.startswith(("| dit-c10-d2", "| var-c10-d2")) for line in table.splitlines()) == 3 + 2


@pytest.mark.slow
def test_the_table_of_the_cpu(tmp_path):
    arguments = ("--models", "dit-c10-d2", "--no-compile", "--threads", "1")
    report, table = rehearsed("cpu_targets.py", tmp_path, *arguments)
    (subject,) = report["results"].values()
    rows = {row["name"]: row for row in subject["contenders"]}
    bundles = [f"dit-c10-d2-{form}" for form in ("W8A8", "W8A16", "W4A16")]
    assert set(rows) == {*bundles, *(f"{name}, ort-cpu" for name in bundles), "fp32", "fp16", "torch eager"}
    for name, row in rows.items():
        assert "failed" not in row
        assert set(row["batches"]) == {"1", "2"}
        for batch in row["batches"].values():
            assert batch["latency_ms"]["total"]["median"] > 0
            # Of the two calls that were played: a denoiser's, no decoder's.
            assert set(batch["roofline"]) == (set() if name == "torch eager" else {"denoise"})
    assert all(f"| {name} |" in table for name in rows)
