"""`--optimize latency` where the best form is the product in floating point with its input no longer rounded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import forced
import numpy as np
import onnx_ir as ir
import pytest
from lowering import LIMIT, graph_of, normal, run, worst

import qexport.runtime as runtime
from qexport.bundle import Bundle
from qexport.lower import lower
from qexport.lower.choose import Choice, choose
from qexport.lower.passes.unrounded_inputs import UnroundedInputs
from qexport.lower.work import GraphWork
from qexport.targets import device_table
from qexport.targets.device_table import DeviceTable, Timing, read_table
from qexport.verify.placement import AT_LOAD, measure_placement

HALF_LIMIT = 1e-3
"""Relative L2 in float16, as for all lowered graphs."""

STATIC = {"name": "fc", "graph": "step", "algorithm": "rtn", "shape": [64, 64], "activation_scales": "static"}
INT8 = {**STATIC, "format": "int8", "activation_format": "int8"}
FP8 = {**STATIC, "format": "fp8-e4m3", "activation_format": "fp8-e4m3"}
W2 = {"name": "fc", "graph": "step", "algorithm": "rtn", "shape": [64, 64], "format": "int2", "group_size": 32}


def chosen(row: dict[str, Any], mode: str, dtype: str, **us: float) -> Choice:
    """The choice for one layer at one row, by times of its forms."""
    timings = tuple(Timing(form.replace("_", "-"), 1, 64, 64, time) for form, time in us.items())
    bundle = cast(Bundle, SimpleNamespace(manifest=SimpleNamespace(layers=[row])))
    work = GraphWork(rows={"fc.weight": Counter({1: 1})}, sizes={"fc.weight": (64, 64)})
    return choose(bundle, {"step": work}, DeviceTable("by hand", "cuda", "made up", timings), mode, dtype)[0]


def test_rounding_that_costs_time_goes_under_latency_only():
    times = {"int8_static": 30.0, "int8_static_folded": 25.0, "float16": 10.0}
    latency = chosen(INT8, "latency", "float16", **times)
    assert (latency.chosen, latency.unrounded, latency.dense) == ("float16", True, True)
    assert latency.reason == "3.00 times as fast as int8-static; its input is no longer rounded"
    for mode, form in (("balanced", "int8-static"), ("memory", "int8-static")):
        kept = chosen(INT8, mode, "float16", **times)
        assert (kept.chosen, kept.unrounded) == (form, False)
    assert chosen(INT8, "balanced", "float16", **{**times, "int8_static": 40.0}).chosen == "int8-static-folded"


def test_a_graph_in_float32_keeps_its_rounding():
    found = chosen(INT8, "latency", "float32", int8_static=30.0, int8_static_folded=25.0, float32=10.0)
    assert (found.chosen, found.unrounded) == ("int8-static-folded", False)


def test_of_two_that_noise_cannot_tell_apart_the_numbers_stay():
    found = chosen(INT8, "latency", "float16", int8_static=30.0, int8_static_folded=10.2, float16=10.0)
    assert (found.chosen, found.unrounded) == ("int8-static-folded", False)


def test_what_the_table_lacks():
    """It is never chosen; where the layer is stored in it nothing changes; other forms are compared without it."""
    found = chosen(FP8, "latency", "float16", fp8_static=30.0, float16=10.0)
    assert (found.chosen, found.unrounded) == ("float16", True)
    assert "the table has no fp8-static-folded" in found.reason
    unknown = chosen(FP8, "latency", "float16", fp8_static_folded=20.0, float16=10.0)
    assert (unknown.chosen, unknown.reason) == ("fp8-static", "the table has no fp8-static")
    two_bit = chosen(W2, "latency", "float16", float16=10.0, int4_b32=20.0)
    assert (two_bit.chosen, two_bit.reason) == ("int2-b32", "the table has no int2-b32")
    assert chosen(W2, "latency", "float16", float16=10.0, int2_b32=20.0).chosen == "float16"
    assert chosen({**W2, "format": "ternary"}, "latency", "float16", float16=10.0, int2_b32=5.0).chosen == "int2-b32"


def test_an_h100_takes_every_layer_of_w8a8_in_float16():
    """Measured there, both forms with rounded inputs are slower than fp16 at every row and shape of the table."""
    table = read_table(device_table.TABLES / "h100.json")
    for row in (INT8, FP8):
        bundle = cast(Bundle, SimpleNamespace(manifest=SimpleNamespace(layers=[row])))
        for rows in (1, 16, 256, 4096):
            for sizes in ((1152, 1152), (1152, 4608), (4608, 1152)):
                work = GraphWork(rows={"fc.weight": Counter({rows: 28})}, sizes={"fc.weight": sizes})
                found = choose(bundle, {"step": work}, table, "latency", "float16")[0]
                assert (found.chosen, found.unrounded) == ("float16", True), (rows, sizes, found.reason)


# The rewrite ----------------------------------------------------------------------------------------------------------

CODES = np.random.default_rng(0).integers(-127, 128, (8, 4)).astype(np.int8)
SCALE = np.random.default_rng(1).random(4).astype(np.float32)
PARAMETERS = {
    "codes": CODES, "scale": SCALE, "zeros": np.zeros(4, np.int8), "xs": np.array(0.05, np.float32),
    "xz": np.array(0, np.int8), "first": np.array([0], np.int64),
}  # fmt: skip
LAYER = """g (float[2, 8] x) => (float[2, 4] y) {
    u = Unsqueeze (x, first)
    q = QuantizeLinear (u, xs, xz)
    d = DequantizeLinear (q, xs, xz)
    w = DequantizeLinear <axis = 1> (codes, scale, zeros)
    m = MatMul (d, w)
    y = Squeeze (m, first)
}"""


def test_quantiser_dimension_and_zero_point_go():
    model = graph_of(LAYER, **PARAMETERS)
    x = normal(2, 8)
    rounded = run(model, {"x": x})
    assert not UnroundedInputs({"another"})(model).modified
    step = UnroundedInputs({"codes"})
    assert step(model).modified
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]
    assert len(next(iter(model.graph)).inputs) == 2
    got = run(model, {"x": x})
    assert worst(got, {"y": x @ (CODES * SCALE)}) <= LIMIT
    assert worst(got, rounded) > 100 * LIMIT  # so the comparison sees whether the input is rounded


def test_a_zero_point_that_means_something_stays():
    model = graph_of(LAYER, **PARAMETERS | {"zeros": np.array([0, 0, 3, 0], np.int8)})
    x = normal(2, 8)
    UnroundedInputs({"codes"})(model)
    assert worst(run(model, {"x": x}), {"y": x @ ((CODES - [0, 0, 3, 0]) * SCALE)}) <= LIMIT


def test_scales_per_token_are_refused():
    text = LAYER.replace("m = MatMul (d, w)", "r = Identity (d)\n m = MatMul (r, w)")
    model = graph_of(text, **PARAMETERS)
    step = UnroundedInputs({"codes"})
    assert not step(model).modified
    assert [refusal.reason for refusal in step.refused] == ["its input is not quantised by one scale"]


# Bundles --------------------------------------------------------------------------------------------------------------


def made(folder: Path, *scheme: Any) -> Bundle:
    from qexport.pipeline import quantize
    from qexport.request import Request
    from qexport.scheme import preset

    return quantize("dit-c10-d2", request=Request(preset(*scheme), samples=1), out=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("number_format", "stored"), [("int", "int8-static"), ("fp8", "fp8-static")])
def test_bundles_by_the_table_of_an_h100(tmp_path, number_format, stored):
    """Every output is that of the bundle whose inputs were never rounded; its weights have the same codes."""
    path = made(tmp_path / "w8a8", 8, 8, None, number_format).path
    plain = made(tmp_path / "w8a16", 8, 16, None, number_format).path
    calls = forced.recorded(plain, [1, 2])
    report = lower(path, "ort-cuda", optimize="latency", batch=8)
    assert {(choice.stored, choice.chosen, choice.unrounded) for choice in report.choices} == {
        (stored, "float16", True)
    }
    graph = report.graphs["denoise"]
    assert graph[UnroundedInputs.name].rewritten == len(report.choices) == 10
    assert graph["projection and attention in one"].rewritten == 2  # what is left is a layer like any other
    assert "QuantizeLinear" not in [node.op_type for node in ir.load(path / "targets/ort-cuda/denoise.onnx").graph]
    assert LIMIT < max(max(found.values()) for found in forced.distances(path, "ort-cuda", calls)) <= HALF_LIMIT
    forms = measure_placement(Bundle.open(path), "cpu", ("serve",), "ort-cuda").forms()
    assert all(AT_LOAD in form for form in forms.values())


@pytest.mark.slow
def test_a_port_of_scales_that_nothing_reads_any_more(tmp_path):
    path = made(tmp_path / "step", 8, 8, None, "int", "step").path
    lower(path, "ort-cuda", optimize="latency")
    player = runtime.load(path, provider="cpu", threads=1, target="ort-cuda").player.with_schedule("ddim-25")
    assert player.play({"label": np.array([1])}, seed=0).shape == (1, 3, 32, 32)


@pytest.mark.slow
def test_two_bits_dequantised_at_load(tmp_path):
    """Codes of 2 bits go the same way as those of 4, with the same numbers."""
    path = made(tmp_path / "w2", 2, 16).path
    timings = (Timing("int2-b32", 1, 128, 128, 2.0), Timing("float32", 1, 128, 128, 1.0))
    table = tmp_path / "t.json"
    table.write_text(DeviceTable("by hand", "cpu", "made up", timings).dumps())
    calls = forced.recorded(path, [1, 2])
    report = lower(path, "ort-cpu", optimize="latency", table=table)
    assert {(choice.stored, choice.chosen) for choice in report.choices} == {("int2-b32", "float32")}
    assert max(max(found.values()) for found in forced.distances(path, "ort-cpu", calls)) <= LIMIT
    forms = measure_placement(Bundle.open(path), "cpu", ("serve",), "ort-cpu").forms()
    assert all(AT_LOAD in form for form in forms.values())
