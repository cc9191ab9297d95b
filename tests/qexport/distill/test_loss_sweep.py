"""How benchmarks/topkld_quality.py names rows, shares them among processes, and judges models with rounded inputs."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qexport.pipeline import load_generator
from qexport.recipe import recipe_for
from qexport.reference import torch_player
from qexport.reference.forced import forced_logits
from qexport.reference.twin import quantised_twin
from qexport.solve import solve
from qexport.verify.quality import drawn_by, torch_logits

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

work = import_module("topkld_jobs")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "topkld_quality.jsonl"

SWEEP = {"models": ["var-c10-d2"], "schemes": ["W2"], "losses": ["forward", "split"], "seeds": [0], "steps": 4}


def test_usual_settings_are_not_in_the_key() -> None:
    (row,) = (job.row for job in work.jobs_of([work.sweep_of(SWEEP | {"losses": ["forward"], "baselines": False})]))
    old = {
        "model": "var-c10-d2", "scheme": "W2", "start": "gptq", "loss": "forward", "top_k": None, "seed": 0, "steps": 4,
        "data": "teacher",
    }  # fmt: skip
    assert row == old


@pytest.mark.parametrize(
    "change",
    [{"lr": [0.02]}, {"scale_lr": [0.0]}, {"ema": [0.9]}, {"rest_lr": [0.005]}, {"samples": 96}, {"batch": 32}],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_are_other_rows_and_reach_training(change: dict[str, object]) -> None:
    usual, other = (work.jobs_of([work.sweep_of(SWEEP | {"baselines": False} | more)])[0] for more in ({}, change))
    assert work.key_of(usual.row) != work.key_of(other.row)
    assert usual.digest != other.digest
    name, value = next(iter(change.items()))
    settings = import_module("topkld_quality").settings_of(other)
    assert getattr(settings, name) == (value[0] if isinstance(value, list) else value)


def test_rates_by_error_are_rows_of_their_own() -> None:
    """A row that names no rate has that of `VARIED`, so one by error needs a word of its own."""
    auto = {name: [work.rate_of("auto")] for name in ("lr", "scale_lr", "rest_lr")}
    usual, other = (work.jobs_of([work.sweep_of(SWEEP | {"baselines": False} | more)])[0] for more in ({}, auto))
    assert work.key_of(usual.row) != work.key_of(other.row)
    assert [other.row[name] for name in auto] == ["auto"] * 3
    settings_of = import_module("topkld_quality").settings_of
    assert [getattr(settings_of(other), name) for name in auto] == [None] * 3
    assert [getattr(settings_of(usual), name) for name in auto] == [0.01, 0.007, 0.0]
    assert work.rate_of("0.02") == 0.02
    assert [work.said(value) for value in (None, "auto", 0.005)] == ["auto", "auto", "0.005"]


def test_measured_rows_have_keys_of_their_own() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert len({work.key_of(row) for row in rows}) == len(rows)


def test_a_row_is_made_once_as_the_first_sweep_wants_it() -> None:
    first = SWEEP | {"fd": 1000, "losses": ["forward"]}
    jobs = work.jobs_of([work.sweep_of(first), work.sweep_of(SWEEP)])
    assert [(job.row["loss"], job.row["start"], job.sweep.fd) for job in jobs] == [
        ("none", "rtn", 1000), ("none", "mse", 1000), ("none", "gptq", 1000), ("forward", "gptq", 1000),
        ("split", "gptq", 0),
    ]  # fmt: skip


def test_denoisers_have_one_loss() -> None:
    jobs = work.jobs_of([work.sweep_of(SWEEP | {"models": ["dit-c10-d2"], "baselines": False})])
    assert [job.row["loss"] for job in jobs] == ["output-mse"]


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    for item, word in (({"model": []}, "'model'"), ({"schemes": ["W5"]}, "W5"), ({"losses": ["kl"]}, "'kl'")):
        plan.write_text(json.dumps([item]))
        with pytest.raises(SystemExit, match=word):
            work.read_plan(plan, SWEEP)


def test_every_row_is_claimed_by_one(tmp_path: Path) -> None:
    plan = [work.sweep_of(SWEEP | {"models": ["var-c10-d2", "var-c10-d3"], "seeds": [*range(20)]})]
    jobs = work.jobs_of(plan)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: list(work.claimed(jobs, tmp_path)), range(4)))
    assert sorted(job.digest for part in taken for job in part) == sorted(job.digest for job in jobs)
    assert list(work.claimed(jobs, tmp_path)) == []  # whoever comes later finds nothing to do


def test_sweeps_in_order_and_one_model_at_a_time(tmp_path: Path) -> None:
    models = ["var-c10-d2", "var-c10-d3", "var-c10-d4"]
    jobs = work.jobs_of([work.sweep_of(SWEEP | {"models": models, "seeds": [s]}) for s in (0, 1)])
    order = [(job.stage, job.model) for job in work.claimed(jobs, tmp_path)]
    assert [stage for stage, _ in order] == sorted(stage for stage, _ in order)
    changes = sum(a[1] != b[1] for a, b in pairwise(order))
    assert changes == 4  # three models, and the second sweep begins with the one that was loaded


@pytest.mark.parametrize("scheme", ["W2A8", "W4A4"])
def test_rounded_inputs_are_judged_as_the_plan_computes_them(scheme: str) -> None:
    """In one pass what `qexport.reference.forced` takes scale by scale; not what the model says without rounding."""
    plain = load_generator("var-c10-d2")
    recipe = recipe_for(work.SCHEMES[scheme], plain.default_layers, "test", "rtn")
    solution = solve(plain, recipe)
    twin = quantised_twin(plain, recipe, solution).quantised
    rounded = import_module("topkld_bench").RoundedLogits(twin, solution.activations)
    ((labels, tokens_BL),) = drawn_by(plain, 2, 0, 2)
    given = torch.from_numpy(labels), torch.from_numpy(tokens_BL)
    with torch.no_grad():
        found, without = rounded.teacher_forced_logits(*given), torch_logits(twin)(labels, tokens_BL)
    assert twin.draw is not None
    wanted = torch.from_numpy(
        np.concatenate(forced_logits(torch_player(twin), twin.draw, labels, tokens_BL, twin.tables), 1)
    )
    assert float((found - wanted).norm()) < 0.1 * float((without - wanted).norm())  # 1e-7 flips a code now and then
