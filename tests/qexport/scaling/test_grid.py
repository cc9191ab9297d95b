"""The grid and its keys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qexport.errors import InputError
from qexport.scaling.grid import Dropped, Measurement, Run, describe, key_of, models_of, plan_grid, series_of, size_of
from qexport.scheme import preset


def test_every_cell_once_and_full_precision_once_a_model():
    runs, dropped = plan_grid(["dit-c10-d2", "var-c10-d2"], [2, 4, 16], ["int", "fp"], ["topkld", "rtn"])
    of_var = [run for run in runs if run.model == "var-c10-d2"]
    assert of_var == [
        Run("var-c10-d2"), Run("var-c10-d2", "fp4-e2m1", "rtn"), Run("var-c10-d2", "int4", "rtn"),
        Run("var-c10-d2", "int2", "rtn"), Run("var-c10-d2", "fp4-e2m1", "topkld"), Run("var-c10-d2", "int4", "topkld"),
        Run("var-c10-d2", "int2", "topkld"),
    ]  # fmt: skip
    assert len(runs) == len(set(runs)) == 14
    assert [run.trained for run in runs] == [False] * 8 + [True] * 6  # the long ones last
    assert dropped == [Dropped("fp2", "fp has 4, 6, 8 bits")]


@pytest.mark.parametrize(
    ("wbits", "kinds", "methods", "says"),
    [
        ([5], ["int"], ["rtn"], "5 is no width"),
        ([4], ["fb"], ["rtn"], "did you mean 'fp'"),
        ([2, 3], ["fp"], ["rtn"], "nothing to run: fp2: fp has 4, 6, 8 bits; fp3"),
        ([4], ["int"], ["ternary"], "ternary"),
    ],
)
def test_grids_that_make_no_sense(wbits, kinds, methods, says):
    with pytest.raises(InputError, match=says):
        plan_grid(["var-c10-d2"], wbits, kinds, methods)


def test_series_are_names_without_their_size():
    names = ["var-c10-d2", "var-d16", "var-d36-512", "dit-xl-2-256", "llamagen-3b-384", "ink"]
    assert [series_of(name) for name in names] == ["var-c10", "var", "var-512", "dit-2-256", "llamagen-384", "ink"]
    assert [size_of(name) for name in names] == ["d2", "d16", "d36", "xl", "3b", "ink"]


def test_models_of_a_series_small_first():
    names, _ = models_of(["var-c10", "dit-c10"], {})
    assert names[:4] == ["dit-c10-d2", "var-c10-d2", "dit-c10-d3", "var-c10-d3"]
    names, dropped = models_of(["var"], {"var-d16": "x.pth"})
    assert names == ["var-d16"]
    assert Dropped("var-d20", "not bundled; pass --checkpoint var-d20=FILE") in dropped
    with pytest.raises(InputError, match="did you mean 'var-c10'"):
        models_of(["var-c11"], {})


def test_schemes_are_those_of_the_presets():
    for wbits in (2, 3, 4, 6, 8):
        assert Run("m", f"int{wbits}", "rtn").scheme == preset(wbits)
    assert Run("m", "fp8-e4m3", "rtn").scheme == preset(8, number_format="fp8")
    assert Run("m").scheme == preset(16)
    assert (Run("m", "fp6-e3m2").kind, Run("m", "int6").kind) == ("fp", "int")


def test_the_key_follows_what_decides_the_result():
    run, how, files = Run("m", "int4", "rtn"), Measurement(), {"model": "1f"}
    key = key_of(run, files, how, "1")
    assert key == key_of(Run("m", "int4", "rtn"), {"model": "1f"}, Measurement(), "1")
    others = [
        key_of(replace(run, method="gptq"), files, how, "1"),
        key_of(replace(run, number_format="int3"), files, how, "1"),
        key_of(run, {"model": "2f"}, how, "1"),
        key_of(run, files, replace(how, fd=10), "1"),
        key_of(run, files, replace(how, images_sha256="3f"), "1"),
        key_of(run, files, how, "2"),
    ]
    assert len({key, *others}) == 7
    # Inception in place of the model's own features is another measurement; without it keys are what they always were.
    assert key_of(run, files, replace(how, features_sha256="4f"), "1") not in {key, *others}
    assert "features_sha256" not in describe(how)
    # How fine-tuning is done concerns only runs that are fine-tuned.
    trained = replace(run, method="topkld")
    for other in (replace(how, topkld_steps=7), replace(how, topkld_batch=7)):
        assert key == key_of(run, files, other, "1")
        assert key_of(trained, files, how, "1") != key_of(trained, files, other, "1")


@pytest.mark.parametrize("wrong", [{"judged_tokens": 0}, {"fd": 1}, {"fd": -1}, {"topkld_samples": 64}])
def test_counts_that_are_too_small(wrong):
    with pytest.raises(InputError):
        Measurement(**wrong)
