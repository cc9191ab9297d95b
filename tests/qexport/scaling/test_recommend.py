"""Recommendations: the command of each kind of run, study formats left out, and what no figure can answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import made_up
import numpy as np
import pytest

from qexport.distill import Distillation, DistillSettings
from qexport.scaling.grid import Run
from qexport.scaling.recommend import difference, distinct, recommend
from qexport.scaling.repeat import command_for, weights_of
from qexport.scaling.select import select

TRAINED = {
    "training": {
        "start_method": "gptq",
        "settings": DistillSettings(steps=150, samples=512, evaluate_every=18).to_json(),
    }
}
TAUGHT = "--method gptq --topkld --steps 150 --train samples=512 --train evaluate_every=18"


def with_settings(row, **more):
    return replace(row, measured=replace(row.measured, settings={**row.settings, **more}))


@pytest.mark.parametrize(
    ("run", "command"),
    [
        (Run("var-c10-d2"), "--wbits 16"),
        (Run("var-c10-d2", "int4", "rtn"), "--wbits 4"),
        (Run("var-c10-d2", "int4", "gptq"), "--wbits 4 --method gptq"),
        (Run("var-c10-d2", "fp8-e4m3", "rtn"), "--wbits 8 --format fp8"),
        (Run("var-c10-d2", "int2", "topkld"), f"--wbits 2 {TAUGHT}"),
    ],
)
def test_the_command_makes_the_run(run, command):
    row = with_settings(made_up.row(run, 1.0, parameters=1e6, bits=4), **TRAINED)
    assert command_for(row) == f"qexport quantize --model var-c10-d2 {command}"
    assert weights_of(row) == ""


def test_what_is_not_as_usual_is_said():
    """A seed, a rate, a loss, a list and a switch of one's own; how often a checkpoint is written is nobody's."""
    settings = DistillSettings(
        Distillation("boosted", 500, 2.0), steps=7, lr=0.02, rest_lr=0.003, scale_weights=(1.0, 0.5), recompute=True,
        seed=3, checkpoint_every=9,
    )  # fmt: skip
    row = made_up.row(Run("var-c10-d2", "int2", "topkld"), 1.0, parameters=1e6, bits=4)
    measurement = {**row.settings["measurement"], "seed": 3}
    training = {"start_method": "rtn", "settings": settings.to_json()}
    command = command_for(with_settings(row, measurement=measurement, training=training))
    assert command.removeprefix("qexport quantize --model var-c10-d2 --wbits 2 --method rtn --topkld ") == (
        "--steps 7 --variant boosted --top-k 500 --train boost=2.0 --lr 0.02 --train rest_lr=0.003 "
        "--train scale_weights=1.0,0.5 --train recompute=true --seed 3"
    )


def test_a_row_of_frozen_parameters_says_so_where_that_is_not_usual(monkeypatch: pytest.MonkeyPatch):
    """`rest_lr` is not recorded where it is 0; were the default another, the command would have to say 0."""
    training = {"start_method": "gptq", "settings": DistillSettings(rest_lr=0.0).to_json()}
    row = made_up.row(Run("var-c10-d2", "int2", "topkld"), 1.0, parameters=1e6, bits=4)
    row = with_settings(row, training=training)
    monkeypatch.setattr("qexport.distill.settings.DistillSettings", partial(DistillSettings, rest_lr=0.0))
    assert "rest_lr" not in command_for(row)
    monkeypatch.setattr("qexport.distill.settings.DistillSettings", partial(DistillSettings, rest_lr=0.003))
    assert "--train rest_lr=0.0" in command_for(row)


def test_weights_that_are_not_bundled_are_named():
    row = made_up.row(Run("var-c10-d5", "int4", "rtn"), 1.0, parameters=1e6, bits=4)
    row = with_settings(row, checkpoints={"model": "0f8c", "vae": "7e75"})
    assert command_for(row).endswith("--wbits 4 --checkpoint var-c10-d5.safetensors")
    assert command_for(row, "my weights/d5.pt").endswith("--wbits 4 --checkpoint 'my weights/d5.pt'")
    assert weights_of(row) == "--checkpoint: the weights of var-c10-d5, SHA-256 0f8c"
    own = made_up.row(Run("var-c10-d2", "int4", "rtn"), 1.0, parameters=1e6, bits=4)
    assert command_for(with_settings(own, checkpoint_file="mine.pt")).endswith("--checkpoint mine.pt")


def test_a_row_that_repeats_another_is_no_other_answer():
    """Fine-tuning that kept its start has `gptq`'s codes. Mutation: without `distinct` the words compare the two."""
    model, kinds = "var-c10-d2", {"parameters": 1e6, "bits": 4}
    start = made_up.row(Run(model, "int4", "gptq"), 1.0, **kinds)
    kept = with_settings(made_up.row(Run(model, "int4", "topkld"), 1.0, **kinds), **TRAINED)
    worse = made_up.row(Run(model, "int4", "rtn"), 2.0, **kinds)
    other_bits = made_up.row(Run(model, "int3", "awq"), 1.0, parameters=1e6, bits=3)
    assert {row.key for row in distinct([kept, start, worse])} == {start.key, worse.key}
    assert len(distinct([kept, start, other_bits])) == 2
    for rows in ([kept, start, worse], [worse, start, kept]):
        (answer,) = recommend(select(rows), 10**6)
        assert answer.row is start
        assert answer.words == "yes, var-c10-d2 int4 rtn is worse"
    (answer,) = recommend(select([kept, start]), 10**6)
    assert answer.words == "the only one that fits"


def test_what_no_bundle_can_hold_is_not_recommended():
    rows = [
        made_up.row(Run("var-c10-d2", "fp4-e2m1", "rtn"), 1.0, parameters=1e6, bits=4),
        made_up.row(Run("var-c10-d2", "int4", "rtn"), 2.0, parameters=1e6, bits=4),
    ]
    (answer,) = recommend(select(rows), 10**6)
    assert answer.row is rows[1]
    assert answer.words == "the only one that fits"


def test_a_difference_of_pairs_is_that_of_the_images():
    a = made_up.row(Run("var-c10-d2", "int4", "rtn"), 2.0, parameters=1e6, bits=4, noise=5.0)
    b = made_up.row(Run("var-c10-d2", "int3", "rtn"), 1.5, parameters=1e6, bits=3, noise=5.0)
    assert difference("cross_entropy", a, b) == pytest.approx((0.5, 0.5))  # the same images: their spread cancels
    low, high = difference("fd", a, b)
    assert (low + high) / 2 == pytest.approx(5)
    assert (high - low) / 2 == pytest.approx(np.hypot(50, 50))


def test_rows_that_were_measured_otherwise_are_left_out():
    rows = [made_up.row(Run("var-c10-d2", f"int{b}", "rtn"), 1.0, parameters=1e6, bits=b) for b in (2, 3, 4)]
    other = replace(rows[0], key="other")
    measurement = {**rows[0].settings["measurement"], "fd": 7}
    other = replace(other, measured=replace(other.measured, settings={**other.settings, "measurement": measurement}))
    newer = replace(rows[2], key="newer", finished_at="2030-01-01T00:00:00+00:00")
    chosen = select([*rows, newer, other])
    assert chosen.left_out == 1
    assert {row.key for row in chosen.rows.values()} == {rows[0].key, rows[1].key, "newer"}
    longer = {**rows[1].settings["measurement"], "topkld_steps": 7}
    rows[1] = replace(rows[1], measured=replace(rows[1].measured, settings={**rows[1].settings, "measurement": longer}))
    assert len(select(rows).rows) == 3  # how fine-tuning was done does not divide
