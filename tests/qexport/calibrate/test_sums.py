"""Sums over inputs against NumPy, and the rows of a convolution against the convolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qexport.calibrate import InputSums, rows_of
from qexport.errors import InputError, UnsupportedError
from qexport.reference import Window

GRAM_ERROR = 1e-5
"""Relative; sums of 2¹⁴ float32 products in float32, then float64: √2¹⁴ · 2⁻²⁴ = 8e-6 at worst."""


def test_sums_are_numpys_and_do_not_depend_on_the_parts() -> None:
    x = np.random.default_rng(0).normal(0.5, [1.0, 10.0, 0.1], (40_000, 3)).astype(np.float32)
    whole, parts = InputSums(3), InputSums(3)
    whole.add(torch.from_numpy(x))
    for part in np.array_split(x, 13):
        parts.add(torch.from_numpy(part))
    exact = x.astype(np.float64)
    for found in (whole.statistics(), parts.statistics()):
        assert found.count == 40_000
        gram = exact.T @ exact
        assert np.linalg.norm(found.gram_II - gram) < GRAM_ERROR * np.linalg.norm(gram)
        np.testing.assert_array_equal(found.absmax_I, np.abs(x).max(axis=0))
        np.testing.assert_allclose(found.mean_abs_I, np.abs(exact).mean(axis=0), rtol=1e-6)
        found.check(3, "layer")


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        ((3, 3), Window(padding=1)),
        ((3, 3), Window(stride=2, padding=(1, 0))),
        ((1, 1), Window()),
        ((3, 2), Window(padding="same", dilation=2)),
        ((2, 2), Window(padding="valid", stride=(2, 1))),
    ],
)
def test_rows_of_a_convolution_are_what_its_weight_multiplies(kernel: tuple[int, int], window: Window) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 9, 8), torch.randn(5, 4, *kernel)
    want = F.conv2d(x, weight, None, window.stride, window.padding, window.dilation)
    rows = list(rows_of(x, kernel, window, "conv"))
    got = torch.stack([(part @ weight.flatten(1).T).T.reshape(want.shape[1:]) for part in rows])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_convolutions_in_groups_are_refused_and_nan_is_named() -> None:
    with pytest.raises(UnsupportedError, match="conv: convolutions in groups"):
        list(rows_of(torch.zeros(1, 4, 3, 3), (3, 3), Window(groups=2), "conv"))
    sums = InputSums(2)
    with pytest.raises(InputError, match="never reached"):
        sums.statistics().check(2, "layer")
    sums.add(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(InputError, match="NaN in calibration, first in channel 1"):
        sums.statistics().check(2, "layer")


def test_constant_channels_over_all_parts() -> None:
    x = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32)
    x[:, 1], x[:, 2], x[:, 3] = -2.5, 0, 1
    x[::2, 3] = -1  # of one magnitude, not of one value
    sums = InputSums(5)
    assert not sums.constant().any()
    for part in np.array_split(x, 3):
        sums.add(torch.from_numpy(part))
    assert sums.constant().tolist() == [False, True, False, False, False]
    sums.add(torch.from_numpy(x[:1] + 1))
    assert not sums.constant().any()
