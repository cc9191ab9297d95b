"""Zero and constant channels, of inputs and of weights: what each algorithm makes of them, against NumPy.

Shape suffixes: O outputs, I inputs, T rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qexport.algorithms import ALGORITHMS, SMOOTHERS, get_algorithm, get_smoother
from qexport.algorithms.gptq import DAMPING, gptq
from qexport.algorithms.mse import mse
from qexport.algorithms.smoothquant import smoothquant
from qexport.formats import get_format
from qexport.numerics.statistics import InputStatistics
from qexport.scheme import PerChannel, PerGroup, TensorSpec

W4, W8, W2 = (
    TensorSpec(get_format("int4"), PerGroup(16)),
    TensorSpec(get_format("int8"), PerChannel()),
    TensorSpec(get_format("int2"), PerGroup(16)),
)
ZERO, CONSTANT = [3, 20], [7, 40]  # in different groups
VALUE = 2.5


def statistics_of(x_TI: npt.NDArray[np.float64]) -> InputStatistics:
    magnitude = np.abs(x_TI).astype(np.float32)
    return InputStatistics(len(x_TI), x_TI.T @ x_TI, magnitude.max(axis=0), magnitude.mean(axis=0))


def problem(constant: float = VALUE) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    x_TI = rng.standard_normal((400, 64)) @ (rng.standard_normal((64, 64)) / 8 + np.eye(64))
    x_TI[:, ZERO], x_TI[:, CONSTANT] = 0, constant
    return rng.standard_normal((12, 64)).astype(np.float32), x_TI


def output_error(w_OI: np.ndarray, restored_OI: np.ndarray, x_TI: np.ndarray) -> float:
    return float(np.square(x_TI @ (w_OI.astype(np.float64) - restored_OI).T).sum())


@pytest.mark.parametrize("spec", [W4, W2, W8], ids=str)
def test_gptq_with_zero_and_constant_channels(spec: TensorSpec) -> None:
    w_OI, x_TI = problem()
    q = gptq(w_OI, spec, statistics=statistics_of(x_TI))
    restored_OI = q.dequantize()
    assert np.isfinite(restored_OI).all()
    # Nothing can be learned of a channel of zeros: it goes to the nearest code under the scale of its group.
    scale_OI = np.repeat(q.scales.astype(np.float32), 64 // q.scales.shape[1], axis=1)
    low, high = spec.format.code_min, spec.format.code_max
    np.testing.assert_array_equal(q.codes[:, ZERO], np.clip(np.rint(w_OI / scale_OI), low, high)[:, ZERO])
    # A constant channel is one like any other: it takes part in making up for the errors of the rest.
    assert output_error(w_OI, restored_OI, x_TI) < 0.8 * output_error(w_OI, mse(w_OI, spec).dequantize(), x_TI)


def test_gptq_uses_a_constant_channel_as_a_bias() -> None:
    """Two channels, 1 and a constant c: in closed form, the second is told u = w₂ + (w₁ − ŵ₁) H₁₂ / H₂₂."""
    x_TI = np.stack([np.tile([0.5, 1.5], 50), np.full(100, 2.0)], axis=1)
    w_OI = np.array([[0.45, 0.8], [-1.4, 0.3], [0.4, -1.0]], np.float32)
    q = gptq(w_OI, TensorSpec(get_format("int8"), PerChannel()), statistics=statistics_of(x_TI))
    h_II = x_TI.T @ x_TI / 100
    h_II += DAMPING * np.trace(h_II) / 2 * np.eye(2)
    scale_O = q.scales[:, 0].astype(np.float64)
    first, second = (1, 0) if h_II[1, 1] > h_II[0, 0] else (0, 1)
    error_O = w_OI[:, first] - scale_O * q.codes[:, first]
    wanted_O = w_OI[:, second] + error_O * h_II[first, second] / h_II[second, second]
    np.testing.assert_array_equal(q.codes[:, second], np.rint(wanted_O / scale_O))


@pytest.mark.parametrize("name", SMOOTHERS)
def test_smoothers_with_zero_and_constant_channels(name: str) -> None:
    w_OI, x_TI = problem()
    factor_I = get_smoother(name)([w_OI], [W8], statistics_of(x_TI))
    assert np.isfinite(factor_I).all()
    assert (factor_I > 0).all()
    np.testing.assert_array_equal(factor_I[ZERO], 1)
    np.testing.assert_allclose((x_TI / factor_I) @ (w_OI * factor_I).T, x_TI @ w_OI.T, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_is_smoothed_by_its_magnitude() -> None:
    w_OI, x_TI = problem()
    live_I = np.ones(64, bool)
    live_I[ZERO] = False
    raw_I = np.sqrt(np.abs(x_TI[:, live_I]).max(axis=0) / np.abs(w_OI[:, live_I]).max(axis=0))  # equation 4, α = ½
    want_I = np.ones(64)
    want_I[live_I] = raw_I / np.exp(np.log(raw_I).mean())
    np.testing.assert_allclose(smoothquant([w_OI], [W8], statistics_of(x_TI)), want_I, rtol=1e-5)


def test_awq_protects_a_great_constant_channel() -> None:
    """Such a channel makes the greatest errors; with a factor above 1 its own shrinks, and the sum with it."""
    w_OI, x_TI = problem(constant=30.0)
    factor_I = get_smoother("awq")([w_OI], [W4], statistics_of(x_TI))
    assert (factor_I[CONSTANT] > 2).all()
    smoothed = mse(w_OI * factor_I, W4).dequantize() / factor_I
    assert output_error(w_OI, smoothed, x_TI) < 0.7 * output_error(w_OI, mse(w_OI, W4).dequantize(), x_TI)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_zero_groups_rows_and_columns_of_a_weight_stay_zero(name: str) -> None:
    w_OI, x_TI = problem()
    w_OI[2], w_OI[5, :16], w_OI[:, 33] = 0, 0, 0
    spec = W2 if name == "ternary" else W4
    q = get_algorithm(name)(w_OI, spec, statistics=statistics_of(x_TI))
    restored_OI = q.dequantize()
    np.testing.assert_array_equal(q.scales[2], 1)
    assert (restored_OI[2] == 0).all()
    if name != "gptq":  # GPTQ may put a code where there was zero, to make up for others in that row
        assert q.scales[5, 0] == 1
        assert (restored_OI[5, :16] == 0).all()
        assert (restored_OI[:, 33] == 0).all()
    assert np.isfinite(restored_OI).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_constant_row_is_kept_to_the_precision_of_its_scale(name: str) -> None:
    """Every weight of a group the same: one code, and an error of fp16's 2⁻¹¹ at most."""
    spec = W2 if name == "ternary" else W4
    w_OI = np.full((2, 64), 0.37, np.float32)
    x_TI = np.random.default_rng(0).standard_normal((200, 64))
    restored_OI = get_algorithm(name)(w_OI, spec, statistics=statistics_of(x_TI)).dequantize()
    np.testing.assert_allclose(restored_OI, w_OI, rtol=2**-10)
