import hashlib
import math

import numpy as np
import pytest
from recipe_weights import CHUNK, fill, unit


def slow_unit(seed: int, key: str, i: int) -> float:
    """One element, with Python's integers, as the fixtures' JSON states it."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")
    x = (base + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return ((x >> 40) - 2**23) / 2**23


def test_unit_is_the_stated_hash_across_chunks():
    values = unit(7, "a.b", CHUNK + 3)
    assert values.dtype == np.float32
    for i in (0, 1, 17, CHUNK - 1, CHUNK, CHUNK + 2):
        assert values[i] == slow_unit(7, "a.b", i)
    assert (unit(8, "a.b", 8) != values[:8]).all()


def test_fill_follows_the_first_rule_found():
    rules = [["keep_me$", ["keep"]], ["norm", ["norm", 0.2]], ["bias$", ["amp", 0.5, 1.5]], ["w$", ["fan", 2.0]]]
    assert fill(1, "keep_me", (2,), rules) is None
    cases = [
        ("norm.bias", (4,), np.float32(0.2) * unit(1, "p.norm.bias", 4) + np.float32(1)),
        ("x.bias", (4,), np.float32(0.5) * unit(1, "p.x.bias", 4) + np.float32(1.5)),
        ("w", (2, 3, 4), np.float32(2.0 * math.sqrt(3 / 12)) * unit(1, "p.w", 24).reshape(2, 3, 4)),
        ("other", (3,), np.float32(0.05) * unit(1, "p.other", 3)),
    ]
    for key, shape, want in cases:
        got = fill(1, key, shape, rules, prefix="p.")
        assert got is not None
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)


def test_fill_refuses_an_unknown_rule():
    with pytest.raises(ValueError, match="recipe rule 'fun'"):
        fill(1, "w", (2,), [["w", ["fun"]]])
