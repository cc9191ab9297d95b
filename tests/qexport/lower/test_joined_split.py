"""`JoinedSplit`: splits of splits become few; where that is not possible, they stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from lowering import graph_of, normal, operators, refused, rewritten

from qexport.lower.passes.joined_split import JoinedSplit, cost, division
from qexport.lower.passes.split_slices import MAX_PARTS


def nested(pieces: int, parts: int, more: str = "", outputs: str = ""):
    """x (N, 1, pieces · parts · 2), split into pieces and each into parts, the parts being outputs."""
    names = [[f"y{i}x{j}" for j in range(parts)] for i in range(pieces)]
    declared = ", ".join([f"float[N, 1, 2] {name}" for row in names for name in row] + ([outputs] if outputs else []))
    lines = [f"{', '.join(f'p{i}' for i in range(pieces))} = Split <axis = 2, num_outputs = {pieces}> (x)"]
    lines += [f"{', '.join(row)} = Split <axis = -1, num_outputs = {parts}> (p{i})" for i, row in enumerate(names)]
    return graph_of(f"g (float[N, 1, {pieces * parts * 2}] x) => ({declared}) {{ {chr(10).join(lines)} {more} }}")


@pytest.mark.parametrize(("pieces", "parts", "left"), [(4, 6, 1), (28, 6, 1 + 6), (16, 6, 1 + 3), (30, 6, 1 + 6)])
def test_splits_of_splits(pieces, parts, left):
    model = nested(pieces, parts)
    rewritten(model, JoinedSplit(), {"x": normal(3, 1, pieces * parts * 2)}, times=1)
    assert operators(model) == ["Split"] * left
    assert all(len(node.outputs) <= MAX_PARTS for node in model.graph)


def test_pieces_that_slices_cut():
    """28 times six and two more, as in DiT-XL/2 whose last layer's modulation is joined to those of the blocks."""
    blocks = [f"p{i}" for i in range(28)]
    rows = [[f"{block}y{j}" for j in range(6)] for block in blocks] + [["z0", "z1"]]
    lines = ["a = Slice (x, c0, c336, two, c1)", "b = Slice (x, c336, c340, two, c1)"]
    lines.append(f"{', '.join(blocks)} = Split <axis = 2, num_outputs = 28> (a)")
    for source, row in zip([*blocks, "b"], rows, strict=True):
        lines.append(f"{', '.join(row)} = Split <axis = 2, num_outputs = {len(row)}> ({source})")
    declared = ", ".join(f"float[N, 1, 2] {name}" for row in rows for name in row)
    constants = {f"c{n}": np.array([n], np.int64) for n in (0, 1, 336, 340)} | {"two": np.array([2], np.int64)}
    model = graph_of(f"g (float[N, 1, 340] x) => ({declared}) {{ {chr(10).join(lines)} }}", **constants)
    rewritten(model, JoinedSplit(), {"x": normal(3, 1, 340)}, times=1)
    assert Counter(operators(model)) == {"Slice": 2, "Split": 1 + 5 + 1}


def test_a_piece_that_something_else_reads_stays_whole():
    model = nested(2, 2, "w = Exp (p1)", "float[N, 1, 4] w")
    refused(model, JoinedSplit(), "differ in width")


def test_one_split_is_no_matter():
    text = "g (float[N, 4] x) => (float[N, 2] a, float[N, 2] b) { a, b = Split <axis = 1, num_outputs = 2> (x) }"
    refused(graph_of(text), JoinedSplit(), "")


def test_another_axis_is_another_matter():
    text = """g (float[4, 4] x) => (float[4, 2] b, float[2, 2] c, float[2, 2] d) {
        a, b = Split <axis = 1, num_outputs = 2> (x)
        c, d = Split <axis = 0, num_outputs = 2> (a)
    }"""
    refused(graph_of(text), JoinedSplit(), "")


def test_a_prime_number_of_parts():
    assert division(37) == [(1, 32), (1, 5)]
    assert division(MAX_PARTS**2 * 2 + 1) is None
    text_parts = nested(2, 2)  # one node is fewer than three
    rewritten(text_parts, JoinedSplit(), {"x": normal(1, 1, 8)}, times=1)


@pytest.mark.parametrize("count", [1, 14, 32, 33, 96, 168, 170, 180, 182, 341])
def test_divisions_cover_all_parts_and_are_the_cheapest(count):
    runs = division(count)
    assert runs is not None
    assert sum(pieces * parts for pieces, parts in runs) == count
    assert all(max(run) <= MAX_PARTS for run in runs)
    factors = [1 + a for a in range(2, MAX_PARTS + 1) if count % a == 0 and count // a <= MAX_PARTS]
    slices = 2 * -(-count // MAX_PARTS)  # a slice and a split for each run of 32
    assert cost(runs) <= min([1 if count <= MAX_PARTS else count, *factors, slices + (count > MAX_PARTS**2)])
