"""`HalfPrecision`: which values are float16, where the casts are, and what stays float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from lowering import graph_of, normal, refused, run, worst
from onnx_ir.passes import common

from qexport.lower.passes.half import HalfPrecision, StatePorts

K = 8
HALF_LIMIT = 1e-3
"""Two units in the last place of 2⁻¹¹: see test_lower.py."""

CHAIN = f"""g (float[B, {K}] x, float[B, {K}] past) => (float[B, {K}] y, float[B, {K}] cache) {{
    s = Sin (x)
    m0 = MatMul (s, w0)
    a0 = Add (m0, b)
    cache = Add (a0, past)
    e = Exp (cache)
    g1 = Mul (a0, e)
    h = Cast <to = 1> (w1)
    m1 = MatMul (g1, h)
    y = Add (m1, b)
}}"""
DRAWN = np.random.default_rng(1).normal(scale=0.25, size=(5, K, K)).astype(np.float32)
WEIGHTS = {"w0": DRAWN[0], "w1": DRAWN[1].astype(np.float16), "b": DRAWN[2, 0]}
FEEDS = {"x": DRAWN[3, :3], "past": DRAWN[4, :3]}
"""Numbers of its own, and small: an exponential makes relative errors out of absolute ones."""
PAST = StatePorts(("past",), ("cache",))


def dtypes(model: ir.Model) -> dict[str, str]:
    """Type of each node's output, by operator and name of the output."""
    return {str(node.outputs[0].name): node.outputs[0].dtype.name for node in model.graph if node.outputs[0].dtype}


def test_what_is_between_the_products_and_what_is_not():
    model = graph_of(CHAIN, **WEIGHTS)
    want = run(model, FEEDS)
    assert HalfPrecision()(model).modified
    common.RemoveUnusedNodesPass()(model)
    found = dtypes(model)
    assert {found[name] for name in ("m0", "a0", "g1", "m1")} == {"FLOAT16"}
    assert {found[name] for name in ("s", "e", "y")} == {"FLOAT"}  # a sine, an exponential, behind the last product
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    assert "h" not in found  # a stored fp16 weight is read as it is
    assert 0 < worst(run(model, FEEDS), want) <= HALF_LIMIT


def test_a_state_that_is_inside_on_both_ends_has_float16_ports():
    model = graph_of(CHAIN, **WEIGHTS)
    want = run(model, FEEDS)
    rewrite = HalfPrecision([PAST])
    rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    assert rewrite.changed == [PAST]
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert types["past"] == types["cache"] == ir.DataType.FLOAT16
    assert types["x"] == types["y"] == ir.DataType.FLOAT
    got = run(model, FEEDS | {"past": FEEDS["past"].astype(np.float16)})
    assert worst({name: array.astype(np.float32) for name, array in got.items()}, want) <= HALF_LIMIT


def test_a_state_that_is_read_outside_keeps_its_type():
    text = CHAIN.replace("s = Sin (x)", "x2 = Add (x, past)\n s = Sin (x2)")
    model = graph_of(text, **WEIGHTS)
    rewrite = HalfPrecision([PAST])
    rewrite(model)
    assert rewrite.changed == []
    assert rewrite.refused[0].reason == "this state is not in float16 on both ends"


def test_quantised_inputs_do_not_cut_the_way():
    quantised = "q = QuantizeLinear (g1, c, z)\n d = DequantizeLinear (q, c, z)\n m1 = MatMul (d, h)"
    text = CHAIN.replace("m1 = MatMul (g1, h)", quantised)
    model = graph_of(text, **WEIGHTS, c=np.array(0.05, np.float32), z=np.array(0, np.int8))
    HalfPrecision()(model)
    found = dtypes(model)
    assert {found[name] for name in ("a0", "g1", "m1")} == {"FLOAT16"}
    assert found["d"] == "FLOAT"  # the scale keeps its bits
    run(model, FEEDS)


def test_autoencoders_stay():
    text = """g (float[B, 2, 4, 4] x) => (float[B, 2, 4, 8] y) {
        a = Conv (x, c)
        b = Conv (a, c)
        y = MatMul (b, w)
    }"""
    refused(graph_of(text, c=normal(2, 2, 1, 1), w=normal(4, 8)), HalfPrecision(), "convolutional")


def test_a_decoder_whose_range_is_known():
    """Convolutions are anchors, shapes read what is there, and the scales of `Resize` stay float32."""
    text = """g (float[B, 2, 4, 4] x) => (float[B, 2, 8, 8] y) {
        s = Mul (x, x)
        a = Conv (s, c)
        n = Shape <start = -1> (a)
        ones = ConstantOfShape <value = float[1] {1.0}> (n)
        l = LayerNormalization (a, ones)
        r = Resize <mode = "nearest"> (l, , scales)
        b = Conv (r, c)
        y = Exp (b)
    }"""
    model = graph_of(text, c=normal(2, 2, 1, 1) / 4, scales=np.array([1, 1, 2, 2], np.float32))
    feeds = {"x": normal(3, 2, 4, 4)}
    want = run(model, feeds)
    rewrite = HalfPrecision(convolutional=True)
    nodes, values = rewrite.values(model.graph)
    assert [node.op_type for node in nodes] == ["Conv", "LayerNormalization", "Resize", "Conv"]
    assert {str(value.name) for value in values} == {"s", "c", "a", "ones", "l", "r", "b"}
    assert rewrite(model).modified
    common.RemoveUnusedNodesPass()(model)
    found = dtypes(model)
    assert {found[name] for name in ("a", "l", "r", "b")} == {"FLOAT16"}
    assert {found[name] for name in ("s", "y")} == {"FLOAT"}
    assert [node.op_type for node in model.graph].count("Cast") == 2  # in and out
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert 0 < worst(run(model, feeds), want) <= 2 * HALF_LIMIT


def test_a_graph_without_products_stays():
    refused(graph_of("g (float[B, 4] x) => (float[B, 4] y) { y = Exp (x) }"), HalfPrecision(), "")
