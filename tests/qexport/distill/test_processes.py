"""Two processes over gloo, started as a user would, beside one with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qexport.distill import processes
from qexport.errors import InputError

SAME_FLOATS = 2e-3
"""Relative, of numbers that are trained beside: Adam moves them by 0.01 whichever way a gradient near 0 points."""

SCRIPT = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from qexport.distill import Distillation, DistillSettings, distill, process_group, processes
from qexport.formats import get_format
from qexport.recipe import Recipe
from qexport.scheme import ActivationSpec, Static
from qexport.solution import Activation, Solution
from tiny_var import tiny_var, tiny_recipe

generator = tiny_var()
recipe = tiny_recipe(generator)
plain = DistillSettings(
    Distillation("forward"), steps=8, batch=16, rest_lr=0.0, samples=48, held_out=16, evaluate_every=4
)
averaged = replace(plain, ema=0.5, checkpoint_every=3)
spec = ActivationSpec(get_format("int8"), Static())
inputs = {layer: Activation(spec, np.array(0.05, np.float32)) for layer in generator.layers if "blocks." in layer}
rules = tuple(replace(rule, activation=spec) for rule in recipe.rules)
rounded = Recipe("w2a8", rules), Solution(activations=inputs)
folder, found = Path(sys.argv[1]), {}

class Killed(Exception):
    pass

def kill(step, *rest):
    if step == 5:
        raise Killed

def run(name, settings, recipe=recipe, solution=Solution(), progress=None, kept=True):
    work = folder / name if kept else None
    trained = distill(generator, recipe, solution, settings, work=work, progress=progress)
    codes = {name: weight.codes.tolist() for name, weight in trained.solution.weights.items()}
    scales = [float(one.scale) for one in trained.solution.activations.values()]
    floats = {name: value.tolist() for name, value in trained.solution.floats.items()}
    found[name] = {
        "losses": trained.report["losses"], "judged": trained.report["judged"], "codes": codes, "in": scales,
        "floats": floats,
    }

with process_group():
    run("plain", plain)
    run("rounded", plain, *rounded)
    run("rest", replace(plain, rest_lr=0.01))
    if os.environ["WORLD_SIZE"] == "2":
        run("sharded", replace(plain, sharded=True))
        run("without a folder", plain, kept=False)
        run("sharded rounded", replace(plain, sharded=True), *rounded)
        run("sharded rest", replace(plain, rest_lr=0.01, sharded=True))
        run("sharded averaged", replace(averaged, rest_lr=0.01, sharded=True))
        try:
            run("cut", replace(averaged, rest_lr=0.01, sharded=True), progress=kill)
        except Killed:
            run("cut", replace(averaged, rest_lr=0.01, sharded=True))
    else:
        run("averaged", replace(averaged, rest_lr=0.01))
        processes.join("cpu")
        run("joined", plain)
        run("joined sharded", replace(plain, sharded=True))
        dist.destroy_process_group()
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
"""

ORDER_OF_ADDITIONS = 1e-4
"""Relative. Gradients of halves of a batch add up to 1e-7 of the whole's; eight steps of Adam, whose moments start at
those gradients, carry that on, and a code here and there may round the other way: one of 10⁵ moves the loss by 1e-5."""

FLIPPED_INPUTS = 2e-3
"""Relative, with inputs of layers rounded: a difference of 1e-7 flips a code, 1/256 of an input's range."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    found = {}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"of{count}")
        script = folder / "train.py"
        script.write_text(SCRIPT)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*launch, str(script), str(folder), str(Path(__file__).parent)], check=True, env=environment, timeout=500
        )
        found[count] = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return found


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(runs: dict[int, list[dict]]) -> None:
    (alone,), (first, second) = ([of["plain"] for of in runs[count]] for count in (1, 2))
    assert first == second
    assert len(alone["losses"]) == 8
    assert alone["losses"][-1] < 0.7 * alone["losses"][0]
    torch.testing.assert_close(
        torch.tensor(first["losses"]), torch.tensor(alone["losses"]), rtol=ORDER_OF_ADDITIONS, atol=0
    )
    assert first["judged"][0][1] == pytest.approx(alone["judged"][0][1], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divided", "one", "tolerance"),
    [
        ("sharded", "plain", ORDER_OF_ADDITIONS),
        ("sharded averaged", "averaged", ORDER_OF_ADDITIONS),
        ("rest", "rest", ORDER_OF_ADDITIONS),
        ("sharded rest", "rest", ORDER_OF_ADDITIONS),
        ("rounded", "rounded", FLIPPED_INPUTS),
        ("sharded rounded", "rounded", FLIPPED_INPUTS),
    ],
)
def test_a_student_in_parts_has_the_loss_curve_of_one(
    runs: dict[int, list[dict]], divided: str, one: str, tolerance: float
) -> None:
    (alone,), (first, second) = runs[1], runs[2]
    assert first[divided] == second[divided]
    for name in ("losses", "judged"):
        torch.testing.assert_close(
            torch.tensor(first[divided][name]), torch.tensor(alone[one][name]), rtol=tolerance, atol=0
        )
    torch.testing.assert_close(
        torch.tensor(first[divided]["in"]), torch.tensor(alone[one]["in"]), rtol=FLIPPED_INPUTS, atol=0
    )
    assert first[divided]["floats"].keys() == alone[one]["floats"].keys()
    assert bool(alone[one]["floats"]) == (one in ("rest", "averaged"))
    for name, value in alone[one]["floats"].items():
        wanted, found = torch.tensor(value), torch.tensor(first[divided]["floats"][name])
        assert float((found - wanted).norm()) <= SAME_FLOATS * float(wanted.norm())


@pytest.mark.slow
def test_a_student_in_parts_goes_on_after_being_killed(runs: dict[int, list[dict]]) -> None:
    for rank in runs[2]:
        assert rank["cut"] == rank["sharded averaged"]


@pytest.mark.slow
def test_samples_that_no_folder_holds_are_those_of_the_first(runs: dict[int, list[dict]]) -> None:
    for rank in runs[2]:
        assert rank["without a folder"] == rank["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("joined", ["joined", "joined sharded"])
def test_one_process_that_is_joined_has_the_loss_curve_of_one_alone(runs: dict[int, list[dict]], joined: str) -> None:
    """DistributedDataParallel and `fully_shard` over a mesh of one: what tests/gpu runs where there is one GPU."""
    (found,) = runs[1]
    for name in ("losses", "judged"):
        torch.testing.assert_close(
            torch.tensor(found[joined][name]), torch.tensor(found["plain"][name]), rtol=ORDER_OF_ADDITIONS, atol=0
        )


def test_alone_nothing_is_reduced() -> None:
    assert processes.world() == 1
    assert processes.rank() == 0
    assert float(processes.mean(torch.tensor(2.5))) == 2.5
    batch = (torch.arange(6),)
    assert torch.equal(processes.share(batch)[0], batch[0])


def test_the_first_process_is_known_before_and_after_they_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.is_first()
    monkeypatch.setenv("RANK", "1")
    assert not processes.is_first()


def test_a_batch_that_cannot_be_shared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world", lambda: 4)
    with pytest.raises(InputError, match="a batch of 6 cannot be shared by 4 processes; make it a multiple of 4"):
        processes.share((torch.arange(6),))


def test_shares_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(processes.share((torch.arange(6),))[0])
    assert torch.cat(parts).tolist() == list(range(6))
