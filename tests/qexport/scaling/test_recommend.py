"""Recommendations: the command of each kind of run, study formats left out, and what no figure can answer."""

from __future__ import annotations

from dataclasses import replace

import made_up
import numpy as np
import pytest

from qexport.scaling.grid import Run
from qexport.scaling.recommend import command_for, difference, recommend
from qexport.scaling.select import select

TRAINED = {"training": {"start_method": "gptq", "settings": {"steps": 150}}}


@pytest.mark.parametrize(
    ("run", "command"),
    [
        (Run("var-c10-d2"), "--wbits 16"),
        (Run("var-c10-d2", "int4", "rtn"), "--wbits 4"),
        (Run("var-c10-d2", "int4", "gptq"), "--wbits 4 --method gptq"),
        (Run("var-c10-d2", "fp8-e4m3", "rtn"), "--wbits 8 --format fp8"),
        (Run("var-c10-d2", "int2", "topkld"), "--wbits 2 --method gptq --topkld --steps 150"),
    ],
)
def test_the_command_makes_the_run(run, command):
    row = made_up.row(run, 1.0, parameters=1e6, bits=4)
    row = replace(row, measured=replace(row.measured, settings={**row.settings, **TRAINED}))
    assert command_for(row) == f"qexport quantize --model var-c10-d2 {command}"


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
