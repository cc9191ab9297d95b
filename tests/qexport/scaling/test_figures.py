"""Bootstrap intervals against SciPy's, and FD against the formula with SciPy's matrix root."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from qexport.scaling.figures import FIGURES, draws, interval, resampled, summarise
from qexport.verify.fd import measure_fd

WIDTH_TOLERANCE = 0.12
"""Of two intervals from 1,000 resamples each: their ends are good to about 7 % of the half-width."""


def test_intervals_of_means_are_scipys():
    x = np.random.default_rng(0).exponential(size=200)
    found = summarise("kl", {"kl": x})
    other = scipy.stats.bootstrap((x,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1))
    assert found["value"] == pytest.approx(x.mean())
    assert found["n"] == 200
    half = (found["ci95"][1] - found["ci95"][0]) / 2
    assert found["ci95"] == pytest.approx(
        [other.confidence_interval.low, other.confidence_interval.high], abs=2 * WIDTH_TOLERANCE * half
    )


@pytest.mark.parametrize("name", ["output_mse", "trajectory_error"])
def test_intervals_of_ratios_are_scipys(name):
    rng = np.random.default_rng(0)
    error, power = rng.exponential(size=150), 5 + rng.exponential(size=150)

    def ratio(e, p):
        found = e.mean() / p.mean()
        return np.sqrt(found) if name == "trajectory_error" else found

    columns = FIGURES[name].columns
    found = summarise(name, dict(zip(columns, (error, power), strict=True)))
    other = scipy.stats.bootstrap(
        (error, power), ratio, paired=True, vectorized=False, method="percentile", n_resamples=2000,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    assert found["value"] == pytest.approx(ratio(error, power))
    half = (found["ci95"][1] - found["ci95"][0]) / 2
    assert found["ci95"] == pytest.approx(
        [other.confidence_interval.low, other.confidence_interval.high], abs=2 * WIDTH_TOLERANCE * half
    )


def test_a_resample_is_a_draw_with_replacement():
    counts_RN = draws(5, seed=3, resamples=7)
    assert counts_RN.shape == (7, 5)
    np.testing.assert_array_equal(counts_RN.sum(axis=1), 5)
    np.testing.assert_array_equal(counts_RN, draws(5, seed=3, resamples=7))
    x = np.arange(5.0)
    by_hand = [np.repeat(x, row.astype(int)).mean() for row in counts_RN]
    np.testing.assert_allclose(resampled(FIGURES["kl"], {"kl": x}, counts_RN), by_hand)


def test_intervals_cover_what_they_should():
    assert interval(np.arange(1001.0)) == (25.0, 975.0)


class Plain:
    """Features that are the image's own numbers."""

    name = "plain"
    mu = np.array([0.5, 0.4, 0.6])
    cov = np.diag([0.02, 0.05, 0.03]) + 0.01

    def features(self, images):
        return torch.flatten(images, 1)


def test_fd_is_the_formula_with_scipys_root():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(40, 3, 1, 1)).astype(np.float32)
    x = images.reshape(40, 3).astype(np.float64)
    mu, cov = x.mean(axis=0), np.cov(x, rowvar=False)
    root = scipy.linalg.sqrtm(cov @ Plain.cov)
    wanted = ((mu - Plain.mu) ** 2).sum() + np.trace(cov + Plain.cov - 2 * np.real(root))
    found = measure_fd([images[:25], images[25:]], Plain(), seed=0)
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert found.low < found.value < found.high
    # Mutation: without the root's factor of two the figure is another.
    assert abs(found.value - (wanted + np.trace(np.real(root)))) > 0.1 * found.value
