"""fp8 codes against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qexport.algorithms import get_algorithm
from qexport.errors import InputError
from qexport.formats import get_format
from qexport.numerics.minifloat import decode, encode, values
from qexport.numerics.quantized import QuantizedTensor
from qexport.scheme import PerChannel, PerGroup, TensorSpec, preset

REFERENCE = {"fp8-e4m3": ml_dtypes.float8_e4m3fn, "fp8-e5m2": ml_dtypes.float8_e5m2}
NAMES = list(REFERENCE)


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_has_the_value_that_ml_dtypes_gives_it(name):
    want = np.arange(256, dtype=np.uint8).view(REFERENCE[name]).astype(np.float32)
    want[np.isinf(want)] = np.nan  # never produced, so not told from NaN
    np.testing.assert_array_equal(values(get_format(name)), want)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_that_of_ml_dtypes(name):
    number_format = get_format(name)
    rng = np.random.default_rng(0)
    table = values(number_format)
    finite = np.unique(table[np.isfinite(table)])
    ties = (finite[1:] + finite[:-1]) / 2  # exact in float32: these decide between half-even and half-away
    spread = rng.normal(size=20000) * 2.0 ** rng.integers(-20, 9, size=20000)
    x = np.concatenate([finite, ties, np.nextafter(ties, 0), spread]).astype(np.float32)
    x = np.clip(x, -number_format.float_max, number_format.float_max)
    want = x.astype(REFERENCE[name]).astype(np.float32)
    np.testing.assert_array_equal(decode(encode(x, number_format), number_format), want)


@pytest.mark.parametrize("name", NAMES)
def test_saturation_and_zero(name):
    number_format = get_format(name)
    got = decode(encode(np.float32([1e9, -1e9, 0.0, -0.0, -1e-30]), number_format), number_format)
    assert got.tolist() == [number_format.float_max, -number_format.float_max, 0, 0, 0]
    assert not np.signbit(got[2:]).any()


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(16)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_round_to_nearest_is_within_half_a_step(name, granularity):
    w = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    q = get_algorithm("rtn")(w, TensorSpec(get_format(name), granularity))
    scale = np.repeat(q.scales.astype(np.float32), 64 // q.scales.shape[1], axis=1)
    want = (w / scale).astype(REFERENCE[name]).astype(np.float32) * scale
    np.testing.assert_array_equal(q.dequantize(), want)
    relative = np.abs(q.dequantize() - w) / np.abs(w)
    assert np.median(relative) < 2.0 ** -(get_format(name).mantissa_bits + 1)


def test_a_nan_pattern_is_refused():
    spec = preset(8, number_format="fp8").weight
    with pytest.raises(InputError, match="no finite fp8-e4m3"):
        QuantizedTensor(np.full((2, 4), 0x7F, np.int8), np.ones((2, 1), np.float16), spec)


def test_schemes_are_named_after_the_format():
    assert preset(8, number_format="fp8").name == "w8a16-fp8"
    assert preset(8, number_format="fp8-e5m2").name == "w8a16-fp8-e5m2"
    with pytest.raises(InputError, match="--wbits 4 is not available with --format fp8"):
        preset(4, number_format="fp8")
