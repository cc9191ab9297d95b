"""Processes that ``torchrun`` starts, over NCCL: one, and two where there are two GPUs, beside one that is alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SCRIPT = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from qexport.distill import Distillation, DistillSettings, distill, drawn_tokens, processes
from qexport.pipeline import load_generator
from qexport.recipe import recipe_for
from qexport.scheme import preset
from qexport.solution import Solution

device, folder, found = sys.argv[1], Path(sys.argv[2]), {}
full = load_generator("var-c10-d2")
recipe = recipe_for(preset(2), full.default_layers, "w2", "mse")
data = drawn_tokens(full, 48, 0)
plain = DistillSettings(Distillation("forward"), steps=8, batch=8, samples=48, held_out=16, evaluate_every=4,
                        checkpoint_every=4)

class Killed(Exception):
    pass

def kill(step, *rest):
    if step == 4:
        raise Killed

def run(name, settings, **given):
    report = distill(full, recipe, Solution(), settings, device=device, data=data, **given).report
    found[name] = {key: report[key] for key in ("losses", "judged", "resumed_after")}

if int(os.environ["WORLD_SIZE"]) == 1:
    run("alone", plain)
processes.join(device)
found["backend"] = dist.get_backend()
found["device"] = str(processes.own_device(device))
run("replicated", plain)
run("sharded", replace(plain, sharded=True))
try:
    run("cut", replace(plain, sharded=True), work=folder / "cut", progress=kill)
except Killed:
    run("cut", replace(plain, sharded=True), work=folder / "cut")
processes.wait()
dist.destroy_process_group()
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
"""

DRIFT = 5e-2
"""Relative: as between CPU and GPU (`test_torch_device.py`), a weight between two codes may fall to either side."""


def launch(count: int, device: str, folder: Path) -> list[dict]:
    """What each of `count` processes found, by rank."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, device, str(folder)], check=True, env=environment, timeout=600)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def compare(count: int, device: str, backend: str, tmp_path: Path) -> None:
    """Every rank says the same, and the loss curves are those of one process alone."""
    (tmp_path / "one").mkdir()
    (one,) = launch(1, device, tmp_path / "one")
    found = [one]
    if count > 1:
        (tmp_path / "many").mkdir()
        found = launch(count, device, tmp_path / "many")
    alone = one["alone"]
    assert alone["losses"][-1] < alone["losses"][0]
    for rank, of in enumerate(found):
        assert of["backend"] == backend
        assert of["device"] == ("cpu" if device == "cpu" else f"{device}:{rank}")
        assert of["cut"]["resumed_after"] == 4
        for name in ("replicated", "sharded", "cut"):
            assert of[name]["judged"] == found[0][name]["judged"]
            torch.testing.assert_close(
                torch.tensor(of[name]["losses"]), torch.tensor(alone["losses"]), rtol=DRIFT, atol=0
            )


def test_one_process_over_nccl(tmp_path: Path) -> None:
    compare(1, "cuda", "nccl", tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_over_nccl(tmp_path: Path) -> None:
    compare(2, "cuda", "nccl", tmp_path)
