"""A quantised convolution as one integer operator: held to integers in NumPy, to the graph that it was, and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from lowering import graph_of, normal, operators, refused, run
from onnx.reference import ReferenceEvaluator
from onnx_ir import serde
from onnx_ir.passes import common

from qexport.lower.passes.integer_convolution import IntegerConvolution, integer_bias

C, OUT, H, K = 8, 16, 6, 3

BODY = f"""g (float[B, {C}, {H}, {H}] x) => (float[B, {OUT}, P, P] y) {{
    q = QuantizeLinear (x, sx, zx)
    d = DequantizeLinear (q, sx, zx)
    s = Cast <to = 1> (sw)
    v = DequantizeLinear <axis = 0> (w, s, zw)
    c = Conv <kernel_shape = [{K}, {K}], pads = [1, 1, 1, 1], strides = [2, 2]> (d, v, b)
    r = QuantizeLinear (c, sy, zy)
    y = DequantizeLinear (r, sy)
}}"""

rng = np.random.default_rng(7)


def parameters(**changed: Any) -> dict[str, np.ndarray]:
    """Of `BODY`; scales at which some inputs and outputs are clipped."""
    found = {
        "sx": np.array(0.02, np.float32), "zx": np.array(-9, np.int8),
        "w": rng.integers(-127, 128, (OUT, C, K, K)).astype(np.int8),
        "sw": rng.uniform(5e-4, 5e-3, OUT).astype(np.float16), "zw": np.zeros(OUT, np.int8),
        "b": normal(OUT), "sy": np.array(0.02, np.float32), "zy": np.array(0, np.int8),
    }  # fmt: skip
    return {**found, **changed}


def exact(p: dict[str, np.ndarray], x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Codes of the output by integers: Σ x̂ ŵ and the bias in int64, one product with a real number, one rounding."""
    codes = np.clip(np.rint(x / p["sx"]).astype(np.int64) + p["zx"], -128, 127) - p["zx"].astype(np.int64)
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (K, K), axis=(2, 3))[:, :, ::2, ::2]
    sums = np.einsum("bchwij,ocij->bohw", windows, p["w"].astype(np.int64)) + bias[:, None, None]
    factor = np.float64(p["sx"]) * p["sw"].astype(np.float64) / np.float64(p["sy"])
    return np.clip(np.rint(sums * factor[:, None, None]), -128, 127)


def test_codes_are_those_of_integer_arithmetic():
    p, x = parameters(), normal(2, C, H, H)
    model = graph_of(BODY, **p)
    IntegerConvolution()(model)
    common.RemoveUnusedNodesPass()(model)
    assert operators(model) == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    want = exact(p, x, integer_bias(p["b"], p["sx"], p["sw"].astype(np.float32)))
    got = run(model, {"x": x})["y"] / p["sy"]
    np.testing.assert_array_equal(np.rint(got), want)
    assert 0 < (np.abs(want) >= 127).mean() < 0.5  # saturation is met, and is not the rule
    reference = ReferenceEvaluator(serde.serialize_model(model)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(np.rint(np.asarray(reference) / p["sy"]), want)


def test_it_differs_from_the_portable_graph_by_the_rounding_of_the_bias_alone():
    """One step at most, and of no more numbers than ½ sₓ s_w / s_y brings near a border, with room for chance."""
    p, x = parameters(), normal(8, C, H, H)
    model = graph_of(BODY, **p)
    before = run(model, {"x": x})["y"]
    IntegerConvolution()(model)
    steps = np.rint((run(model, {"x": x})["y"] - before) / p["sy"])
    share = np.mean(steps != 0)
    reach = float((p["sx"] * p["sw"].astype(np.float32) / p["sy"]).mean()) / 2
    assert np.abs(steps).max() <= 1
    assert share <= 2 * reach
    exactly = parameters(b=np.zeros(OUT, np.float32))
    plain = graph_of(BODY, **exactly)
    before = run(plain, {"x": x})["y"]
    IntegerConvolution()(plain)
    np.testing.assert_array_equal(run(plain, {"x": x})["y"], before)  # no bias, no difference


def test_a_bias_in_other_units_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    p, x = parameters(), normal(1, C, H, H)
    model = graph_of(BODY, **p)
    before = run(model, {"x": x})["y"]
    monkeypatch.setattr(
        "qexport.lower.passes.integer_convolution.integer_bias", lambda b, x, s: 2 * integer_bias(b, x, s)
    )
    IntegerConvolution()(model)
    assert np.abs(run(model, {"x": x})["y"] - before).max() > 2 * p["sy"]


TWO = BODY.replace(f"float[B, {OUT}, P, P] y", f"float[B, {OUT}, P, P] z").replace(
    "}", """    e = QuantizeLinear (y, sy, zy)
    f = DequantizeLinear (e, sy, zy)
    u = DequantizeLinear <axis = 0> (w2, s, zw)
    i = Conv <kernel_shape = [1, 1]> (f, u)
    j = QuantizeLinear (i, sx, zx)
    z = DequantizeLinear (j, sx, zx)
}""",
)  # fmt: skip


def test_one_behind_the_other_and_without_a_bias():
    """The output's pair in front of another pair of the same numbers: both are rewritten, and nothing else changes."""
    p = parameters(b=np.zeros(OUT, np.float32), w2=rng.integers(-127, 128, (OUT, OUT, 1, 1)).astype(np.int8))
    model, x = graph_of(TWO, **p), normal(1, C, H, H)
    before = run(model, {"x": x})["z"]
    rewrite = IntegerConvolution()
    rewrite(model)
    assert len(rewrite.rewritten) == 2
    np.testing.assert_array_equal(run(model, {"x": x})["z"], before)


def test_codes_handed_from_one_to_the_next():
    """Where an output is rounded only as the input of the next, the codes are handed on as they are."""
    text = TWO.replace("    y = DequantizeLinear (r, sy)\n    e = QuantizeLinear (y, sy, zy)\n", "").replace(
        "(e, sy, zy)", "(r, sy, zy)"
    )
    p = parameters(b=np.zeros(OUT, np.float32), w2=rng.integers(-127, 128, (OUT, OUT, 1, 1)).astype(np.int8))
    model, x = graph_of(text, **p), normal(1, C, H, H)
    before = run(model, {"x": x})["z"]
    IntegerConvolution()(model)
    common.RemoveUnusedNodesPass()(model)
    wanted = ["QuantizeLinear", "QLinearConv", "QLinearConv", "DequantizeLinear"]
    assert [name for name in operators(model) if name != "DequantizeLinear"] == wanted[:3]
    np.testing.assert_array_equal(run(model, {"x": x})["z"], before)


@pytest.mark.parametrize(
    ("text", "changed", "reason"),
    [
        (BODY, {"zw": np.ones(OUT, np.int8)}, "zero points other than 0"),
        (BODY, {"w": np.ones((OUT, C, K, K), np.uint8), "zw": np.zeros(OUT, np.uint8)}, "weight is not int8"),
        (BODY, {"b": np.full(OUT, 3e5, np.float32)}, "may not fit into 32 bits"),
        (BODY, {"zx": np.array(120, np.uint8)}, "no known int8 scale"),
        (BODY.replace("<axis = 0>", "<axis = 1>"), {"sw": np.ones(C, np.float16), "zw": np.zeros(C, np.int8)},
         "no scales by output channel"),
        (BODY.replace("x) =>", f"x, float[{OUT}] b) =>"), {}, "bias is not a constant"),
        (BODY.replace("y = Deq", "a = Neg (c)\n    y = Deq").replace("P] y)", f"P] y, float[B, {OUT}, P, P] a)"), {},
         "read before it is rounded"),
        (BODY.replace("y = DequantizeLinear (r, sy)", "y = DequantizeLinear (r, sx)"), {}, "no known int8 scale"),
        (BODY.replace("(d, v, b)", "(x, v, b)"), {}, ""),
    ],
    ids=["zero points", "uint8", "overflow", "type of codes", "axis", "bias", "read twice", "scales", "float input"],
)  # fmt: skip
def test_where_a_convolution_stays_as_it_is(text, changed, reason):
    p = parameters(**changed)
    if reason == "bias is not a constant":
        del p["b"]
    refused(graph_of(text, **p), IntegerConvolution(), reason)


def test_onnx_runtime_keeps_it_where_it_would_not_find_it(tmp_path):
    """With a second reader behind the pair ONNX Runtime leaves Q/DQ around a float convolution; the operator stays."""
    text = BODY.replace("P] y)", "P] y, float[B, ONE, N] z)").replace(
        "}", "    shape = Constant <value_ints = [0, 1, -1]> ()\n    z = Reshape (y, shape)\n}"
    ).replace("ONE", "M")  # fmt: skip
    model = graph_of(text, **parameters())
    IntegerConvolution()(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    data = serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert (found.count("QLinearConv"), found.count("Conv")) == (1, 0)
    x = normal(1, C, H, H)
    np.testing.assert_array_equal(session.run(["y"], {"x": x})[0], run(model, {"x": x})["y"])
