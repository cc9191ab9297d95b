"""Rows, operations and bytes of a plan, against figures worked out by hand."""

from __future__ import annotations

from collections import Counter

from qexport.lower.work import plan_work

SCALES = (1, 4, 9, 16, 25, 36, 64)
"""Tokens of each call of var-c10-d2; with guidance there are two rows for each token of each image."""

WIDTH, HEAD, LAYERS, HEADS = 128, 64, 2, 2


def test_rows_of_a_transformer(w4_bundle):
    work = plan_work(w4_bundle, 3)["step"]
    assert work.calls == len(SCALES)
    assert work.rows["blocks.1.ffn.fc1.weight"] == Counter({2 * 3 * tokens: 1 for tokens in SCALES})
    assert work.rows["blocks.0.ada_lin.1.weight"] == Counter({6: len(SCALES)})
    assert work.sizes["blocks.1.ffn.fc1.weight"] == (WIDTH, 4 * WIDTH)


def test_operations_of_a_transformer(w4_bundle):
    one, three = (plan_work(w4_bundle, size)["step"] for size in (1, 3))
    rows = 2 * sum(SCALES)
    block = 2 * rows * WIDTH * (3 * WIDTH + WIDTH + 8 * WIDTH) + len(SCALES) * 2 * 2 * WIDTH * 6 * WIDTH
    past, attention = 0, 0
    for tokens in SCALES:
        past += tokens
        attention += 2 * HEADS * 4 * tokens * past * HEAD
    head = 2 * rows * WIDTH * 4096 + len(SCALES) * 2 * 2 * WIDTH * 2 * WIDTH
    known = LAYERS * (block + attention) + head
    rest = one.flops - known  # word embedding, resizing, one convolution
    assert 0 < rest < 0.2 * one.flops
    assert three.flops == 3 * one.flops


def test_bytes_of_ports(w4_bundle):
    decode = plan_work(w4_bundle, 2)["decode"]
    assert decode.port_bytes == 2 * (32 * 64 + 3 * 32 * 32) * 4


def test_the_first_calls_only(w4_bundle):
    """What a bench of so many calls plays: the first scales, and no decoder."""
    work = plan_work(w4_bundle, 3, calls=2)
    assert (work["step"].calls, work["decode"].calls) == (2, 0)
    assert work["step"].rows["blocks.1.ffn.fc1.weight"] == Counter({2 * 3 * tokens: 1 for tokens in SCALES[:2]})
    whole, all_calls = plan_work(w4_bundle, 3), plan_work(w4_bundle, 3, calls=len(SCALES) + 1)
    assert all_calls == whole
    assert 0 < work["step"].flops < whole["step"].flops * sum(SCALES[:3]) / sum(SCALES)
