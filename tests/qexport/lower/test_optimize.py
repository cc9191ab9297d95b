"""`lower --optimize`: what is chosen by which table, that numbers stay, and that constants really are made at load."""

from __future__ import annotations

import json
from pathlib import Path

import forced
import numpy as np
import onnx_ir as ir
import pytest
from lowering import HEAD, LIMIT, add_int4, normal, run, worst
from onnx import parser
from onnx_ir.passes import common

from qexport.bundle import Bundle
from qexport.errors import InputError, UnsupportedError
from qexport.lower import lower
from qexport.lower.choose import Choice, forms_of, summary
from qexport.lower.passes.dense_weights import DenseWeights
from qexport.targets.device_table import DeviceTable, Timing
from qexport.verify.placement import AT_LOAD, measure_placement

HALF_LIMIT = 1e-3
"""Relative L2 in float16, as for all lowered graphs."""


def table(path: Path, provider: str, **us: dict[int, float]) -> Path:
    """A table with one shape: microseconds by form and rows."""
    timings = [Timing(form.replace("_", "-"), n, 128, 128, t) for form, times in us.items() for n, t in times.items()]
    path.write_text(DeviceTable("by hand", provider, "made up", tuple(timings)).dumps())
    return path


@pytest.fixture
def slow_codes(tmp_path) -> Path:
    """Codes win below 16 rows and lose above."""
    return table(tmp_path / "t.json", "cpu", int4_b32={1: 1.0, 16: 20.0, 256: 400.0}, float32={1: 4.0, 256: 100.0})


def test_each_layer_by_its_rows(w4_bundle, copied, slow_codes):
    path = copied(w4_bundle)
    calls = forced.recorded(path, [1, 2])
    report = lower(path, "ort-cpu", optimize="latency", batch=2, table=slow_codes)
    choices = {choice.layer: choice for choice in report.choices}
    assert choices["blocks.0.ada_lin.1"].chosen == "int4-b32"  # four rows, one for each image and guidance
    assert choices["blocks.0.ffn.fc1"].chosen == "float32"  # up to 256 rows
    assert choices["blocks.0.ffn.fc1"].rows == {4: 1, 16: 1, 36: 1, 64: 1, 100: 1, 144: 1, 256: 1}
    assert "times as fast as int4-b32" in choices["blocks.0.ffn.fc1"].reason
    assert max(max(found.values()) for found in forced.distances(path, "ort-cpu", calls)) <= LIMIT
    forms = measure_placement(Bundle.open(path), "cpu", ("serve",), "ort-cpu").forms()
    for name, choice in choices.items():
        assert (AT_LOAD in forms[name]) == choice.dense, (name, forms[name])
    written = json.loads((path / "reports/lower-ort-cpu.json").read_text())
    assert written["aim"]["device"] == "by hand"
    assert {entry["layer"] for entry in written["choices"]} == set(choices)


def test_aims_differ(w4_bundle, copied, tmp_path):
    path = copied(w4_bundle)
    file = table(tmp_path / "t.json", "cpu", int4_b32={1: 11.0}, float32={1: 10.0})
    stored = {
        aim: sum(not choice.dense for choice in lower(path, "ort-cpu", optimize=aim, table=file).choices)
        for aim in ("latency", "balanced", "memory")
    }
    assert stored == {"latency": 0, "balanced": 10, "memory": 10}  # a tenth is not worth the memory
    file = table(tmp_path / "t.json", "cpu", int4_b32={1: 13.0}, float32={1: 10.0})
    assert all(choice.dense for choice in lower(path, "ort-cpu", optimize="balanced", table=file).choices)


def test_large_batches_of_a_denoiser_are_not_slowed_down_on_cuda(dit_bundle, copied):
    path = copied(dit_bundle)
    calls = forced.recorded(path, [1, 2])
    one = lower(path, "ort-cuda", optimize="latency", batch=64)
    assert "H100" in one.aim["device"]
    assert all(choice.dense for choice in one.choices)  # 2 · 64 · 64 rows; on an H100 fp16 is faster from some 64 on
    assert one.graphs["denoise"]["projection and attention in one"].rewritten == 2  # which takes floating point only
    assert max(max(found.values()) for found in forced.distances(path, "ort-cuda", calls)) <= HALF_LIMIT
    forms = measure_placement(Bundle.open(path), "cpu", ("serve",), "ort-cuda").forms()
    assert forms["blocks.0.adaLN_modulation.1"] == f"MatMul, {AT_LOAD}, in one product of 2 layers"
    assert lower(path, "ort-cuda", optimize="memory", batch=64).graphs["denoise"].keys().isdisjoint(
        {DenseWeights.name}
    )  # fmt: skip


def test_what_the_table_lacks_is_left_and_said(dit_bundle, copied, tmp_path):
    path = copied(dit_bundle)
    file = table(tmp_path / "t.json", "cuda", float16={1: 1.0})
    report = lower(path, "ort-cuda", optimize="latency", table=file)
    assert {choice.reason for choice in report.choices} == {"the table has no int4-b32"}
    assert not any(choice.dense for choice in report.choices)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"target": "ort-cpu", "optimize": "speed"}, InputError, "latency, memory, balanced"),
        ({"target": "ort-cpu", "optimize": "latency", "batch": 0}, InputError, "batch is 0"),
        ({"target": "ort-cpu", "optimize": "latency", "table": None}, InputError, "--calibrate-device"),
        ({"target": "ort-cuda", "optimize": "latency"}, InputError, "a table of cpu"),
    ],
)
def test_refusals(w4_bundle, copied, slow_codes, tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.setenv("QEXPORT_DEVICES", str(tmp_path / "none"))
    path = copied(w4_bundle)
    before = sorted(path.rglob("*"))
    with pytest.raises(error, match=words):
        lower(path, **{"table": slow_codes, **arguments})
    assert sorted(path.rglob("*")) == before


def test_tensorrt_chooses_by_itself(copied, w4_bundle, monkeypatch):
    monkeypatch.setattr("qexport.lower.targets.TENSORRT_BLOCKS", (32,))
    with pytest.raises(UnsupportedError, match="by itself"):
        lower(copied(w4_bundle), "tensorrt", optimize="latency")


@pytest.mark.parametrize(
    ("row", "stored", "dense"),
    [
        ({"format": "int4", "group_size": 64}, "int4-b64", "float16"),
        ({"format": "int3", "group_size": 32}, "int4-b32", "float16"),
        ({"format": "int2", "group_size": 128}, "int2-b128", "float16"),
        ({"format": "ternary", "group_size": 32}, "int2-b32", "float16"),
        ({"format": "int8"}, "int8-channel", "float16"),
        ({"format": "int6", "activation_format": "int8"}, "int8-static", "int8-static-folded"),
        (
            {"format": "int8", "activation_format": "int8", "activation_scales": "per token"},
            "int8-token", "int8-token-folded",
        ),
        ({"format": "fp8-e4m3", "activation_format": "fp8-e4m3"}, "fp8-static", "fp8-static-folded"),
    ],
)  # fmt: skip
def test_names_of_forms(row, stored, dense):
    assert forms_of(row, "float16") == (stored, dense)


def test_summary_counts():
    one = [Choice(f"l{i}", "g", f"l{i}.weight", "int4-b32", "float16", f"{i} times as fast") for i in range(3)]
    assert summary(one) == {("int4-b32", "float16", "0 times as fast"): 3}


def graph_of_a_layer() -> ir.Model:
    text = f"""{HEAD}
    g (float[m, 64] x) => (float[m, 8] y)
    <float[64, 8] codes, float16[2, 8] scale> {{
        s = Cast <to = 1> (scale)
        w = DequantizeLinear <axis = 0, block_size = 32> (codes, s)
        y = MatMul (x, w)
    }}"""
    proto = parser.parse_model(text)
    model = ir.serde.deserialize_model(proto)
    rng = np.random.default_rng(3)
    graph = model.graph
    scale = ir.tensor(rng.random((2, 8)).astype(np.float16), name="scale")
    for name, tensor in (("codes", ir.tensor(np.zeros((64, 8), np.float32))), ("scale", scale)):
        value = next(value for node in graph for value in node.inputs if value is not None and value.name == name)
        value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
        value.type = ir.TensorType(tensor.dtype)
        graph.register_initializer(value)
    add_int4(model, "codes", rng.integers(-8, 8, (64, 8)))
    common.ShapeInferencePass()(model)
    return model


def test_the_same_numbers_and_only_where_chosen():
    feeds = {"x": normal(5, 64)}
    want = run(graph_of_a_layer(), feeds)
    model = graph_of_a_layer()
    left = DenseWeights({"another"})
    assert not left(model).modified
    step = DenseWeights({"codes"})
    assert step(model).modified
    assert "DequantizeLinear" not in [node.op_type for node in model.graph]
    assert worst(run(model, feeds), want) <= LIMIT
    model.graph.initializers["scale"].const_value = ir.tensor(
        2 * np.asarray(model.graph.initializers["scale"].const_value), name="scale"
    )
    assert worst(run(model, feeds), want) > 0.9  # the comparison sees a doubled scale
