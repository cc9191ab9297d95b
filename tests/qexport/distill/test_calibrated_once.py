"""`torchrun` of the pipeline: the first process calibrates, the other has what it found and folds it in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, json, os, sys
from pathlib import Path
import torch
import qexport.pipeline as pipeline
import qexport.solve as solving
import qexport.training as training
from qexport.distill import Distillation, DistillSettings, process_group
from qexport.errors import InputError
from qexport.methods import parse_method
from qexport.request import Request
from qexport.scheme import preset

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found = {"threads": [], "start": None, "refused": None}
plain_solve, plain_tune = solving.solve, training.fine_tune

def solve(*args, **kwargs):
    found["threads"].append(torch.get_num_threads())
    return plain_solve(*args, **kwargs)

def fine_tune(generator, recipe, solution, *args, **kwargs):
    digest = hashlib.sha256()
    for spec in generator.graphs:
        for name, value in sorted(spec.parameters().items()):
            digest.update(name.encode() + value.detach().numpy().tobytes())
    for name, factor in sorted(solution.smooth.items()):
        digest.update(name.encode() + factor.tobytes())
    for name, weight in sorted(solution.weights.items()):
        digest.update(name.encode() + weight.codes.tobytes() + weight.scales.tobytes())
    assert solution.smooth and solution.weights
    found["start"] = digest.hexdigest()
    return plain_tune(generator, recipe, solution, *args, **kwargs)

solving.solve, training.fine_tune = solve, fine_tune
request = Request(preset(4), parse_method("smoothquant+gptq"), samples=2)
settings = DistillSettings(Distillation("forward"), steps=1, batch=2, samples=6, held_out=2, evaluate_every=1)
asked = training.Training(settings)

def refuse(*args, **kwargs):
    raise InputError("not to be had")

with process_group():
    pipeline.quantize("var-c10-d2", request=request, training=asked, out=folder / "bundle")
    solving.solve = refuse
    try:
        pipeline.quantize("var-c10-d2", request=request, training=asked, out=folder / "none")
    except InputError as error:
        found["refused"] = str(error)
(folder / f"rank{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_the_first_of_two_processes_calibrates_for_both(tmp_path: Path) -> None:
    script = tmp_path / "quantise.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, env=environment, timeout=500)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["threads"] == [2]  # its own and the waiting one's
    assert second["threads"] == []
    assert first["start"] == second["start"] is not None
    assert first["refused"] == second["refused"] == "not to be had"
    assert (tmp_path / "bundle" / "manifest.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["bundle"]
