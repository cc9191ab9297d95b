"""`VectorEntries`: entries gathered one by one come from one split, in the same rank."""

from __future__ import annotations

import numpy as np
from lowering import graph_of, normal, operators, refused, rewritten

from qexport.lower.passes.split_slices import MAX_PARTS
from qexport.lower.passes.vector_entries import VectorEntries

CONSTANTS = {
    "first": np.array([0], np.int64), "second": np.array([1], np.int64), "i2": np.array(2, np.int64),
    "last": np.array(-1, np.int64), "pair": np.array([0, 1], np.int64),
}  # fmt: skip


def test_scalars_and_a_vector_of_one():
    text = """g (float[4] row, float[B] x) => (float[1] a, float[B] b, float c) {
        a = Slice (row, first, second, first, second)
        p = Gather <axis = 0> (row, i2)
        b = Mul (p, x)
        c = Gather <axis = 0> (row, last)
    }"""
    model = graph_of(text, **CONSTANTS)
    rewritten(model, VectorEntries(), {"row": normal(4), "x": normal(3)}, times=1)
    assert operators(model) == ["Split", "Squeeze", "Squeeze", "Mul"]


def gathers(size: str, index: str = "i2"):
    return graph_of(
        f"g (float[{size}] row) => (float a, float b) {{ a = Gather (row, {index})\n b = Gather (row, last) }}",
        **CONSTANTS,
    )


def test_what_stays():
    refused(gathers("N"), VectorEntries(), "")
    refused(gathers(str(MAX_PARTS + 1)), VectorEntries(), "more than")
    text = "g (float[4] row) => (float a, float[2] b) { a = Gather (row, i2)\n b = Gather (row, pair) }"
    refused(graph_of(text, **CONSTANTS), VectorEntries(), "")
