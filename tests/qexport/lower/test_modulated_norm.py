"""A norm and its modulation as one norm: adaptive layer norm, one row of scale and shift for each sample."""

from __future__ import annotations

import numpy as np
import pytest
from lowering import LIMIT, graph_of, normal, operators, refused, rewritten, run, worst

from qexport.lower.passes.modulated_norm import ModulatedNorm
from qexport.lower.passes.skip_norm import SkipNorm

B, L, D = 3, 5, 8

ADAPTIVE = f"""g (float[B, L, {D}] x, float[B, 1, {D}] s, float[B, 1, {D}] b) => (float[B, L, {D}] y) {{
    n = LayerNormalization <axis = -1, epsilon = 0.001> (x, one)
    m = Mul (n, s)
    y = Add (m, b)
}}"""
ONE = {"one": np.ones(D, np.float32)}


def feeds(batch: int = B, tokens: int = L) -> dict[str, np.ndarray]:
    return {"x": normal(batch, tokens, D), "s": normal(batch, 1, D), "b": normal(batch, 1, D)}


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_sample_has_its_own_row(batch, tokens):
    model = graph_of(ADAPTIVE, **ONE)
    rewritten(model, ModulatedNorm(), feeds(batch, tokens), times=1)
    assert operators(model) == ["LayerNormalization"]
    node = next(iter(model.graph))
    assert [value.name for value in node.inputs if value] == ["x", "s", "b"]
    assert node.attributes.get_float("epsilon", 0) == pytest.approx(0.001)


def test_operands_in_the_other_order():
    text = ADAPTIVE.replace("(n, s)", "(s, n)").replace("(m, b)", "(b, m)")
    rewritten(graph_of(text, **ONE), ModulatedNorm(), feeds(), times=1)


def test_the_rows_of_other_samples_would_be_seen():
    model, given = graph_of(ADAPTIVE, **ONE), feeds()
    want = run(model, given)
    ModulatedNorm()(model)
    assert worst(run(model, given), want) <= LIMIT
    for name in ("s", "b"):
        swapped = given | {name: given[name][::-1]}
        assert worst(run(model, swapped), want) > 1e5 * LIMIT


def test_another_epsilon_would_be_seen():
    model, given = graph_of(ADAPTIVE, **ONE), feeds()
    given["x"] *= np.float32(0.1)
    want = run(model, given)
    ModulatedNorm()(model)
    next(iter(model.graph)).attributes.pop("epsilon")
    assert worst(run(model, given), want) > 100 * LIMIT


def test_a_residual_in_front_is_a_sum_of_its_own():
    residual = f"float[B, L, {D}] r, float[B, L, {D}] x"
    text = ADAPTIVE.replace(f"float[B, L, {D}] x", residual).replace("(x, one)", "(t, one)")
    model = graph_of(text.replace("    n =", "    t = Add (x, r)\n    n ="), **ONE)
    rewritten(model, ModulatedNorm(), feeds() | {"r": normal(B, L, D)}, times=1)
    assert operators(model) == ["Add", "LayerNormalization"]
    refused(model, SkipNorm(), "a scale that is no vector")


HALF_OF_IT = f"""g (float[B, L, {D}] x, float[B, 1, {D}] s, float[B, 1, {D}] b)
    => (float[B, L, {D}] y, float[B, L, {D}] z) {{
    n = LayerNormalization (x, one)
    m = Mul (n, s)
    y = Add (m, b)
    z = Neg (m)
}}"""


@pytest.mark.parametrize(
    ("text", "parameters", "reason"),
    [
        (ADAPTIVE.replace("B, L,", "B, 2, L,"), ONE, "three dimensions"),
        (ADAPTIVE.replace("axis = -1", "axis = 1"), {"one": np.ones((L, D), np.float32)}, "over the last axis"),
        (ADAPTIVE, {"one": np.full(D, 2, np.float32)}, "a scale or a shift of its own"),
        (ADAPTIVE.replace("(x, one)", "(x, one, zero)"), ONE | {"zero": normal(D)}, "a scale or a shift of its own"),
        (ADAPTIVE.replace("float[B, 1,", "float[B, L,"), ONE, "one row for each sample"),
        (ADAPTIVE.replace(f"float[B, 1, {D}]", "float[B, 1, 1]"), ONE, "one row for each sample"),
        (ADAPTIVE.replace(f"float[B, 1, {D}] s", f"float[{D}] s"), ONE, "one row for each sample"),
        (ADAPTIVE.replace(f"float[B, 1, {D}] b", "float[B, 1, 1] b"), ONE, "one row for each sample"),
        (ADAPTIVE.replace(f"[B, L, {D}] x", f"[1, L, {D}] x"), ONE, "broadcast over the samples"),
        (HALF_OF_IT, ONE, ""),
    ],
    ids=["rank", "axis", "scale", "shift", "row of a token", "number of a sample", "vector", "narrow shift",
         "one sample for all", "product read twice"],
)  # fmt: skip
def test_where_norm_and_modulation_stay_apart(text, parameters, reason):
    refused(graph_of(text, **parameters), ModulatedNorm(), reason)
