"""Figures with resamples against NumPy, resample by resample."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qexport.scaling.analysis.resampled import estimate, ratio, relative_l2, squares, to_json
from qexport.scaling.figures import draws


@pytest.fixture
def columns() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.gamma(2, size=(12, 3, 2)), generator.gamma(9, size=(12, 3, 2))


def test_resamples_are_those_of_repeated_images(columns):
    error, power = columns
    found = estimate(relative_l2, error, power)
    assert found.value == pytest.approx(np.sqrt(error.sum(axis=0) / power.sum(axis=0)))
    for resample, counts in enumerate(draws(12)[:50]):
        picked = np.repeat(np.arange(12), counts.astype(int))
        wanted = np.sqrt(error[picked].sum(axis=0) / power[picked].sum(axis=0))
        assert found.samples[resample] == pytest.approx(wanted)
    assert found.ci95[..., 0] == pytest.approx(np.percentile(found.samples, 2.5, axis=0))
    assert found.ci95[..., 1] == pytest.approx(np.percentile(found.samples, 97.5, axis=0))
    assert found[1, 0].ci95 == pytest.approx(found.ci95[1, 0])


def test_the_interval_of_a_mean_is_that_of_theory():
    """± 1.96 s/√N within what 1000 resamples leave, here a tenth; a doubled column has a doubled interval."""
    values = np.random.default_rng(1).normal(size=200)
    half = 1.96 * values.std() / np.sqrt(200)
    for factor in (1, 2):
        low, high = estimate(lambda mean: mean, factor * values).ci95
        assert (high - low) / 2 == pytest.approx(factor * half, rel=0.1)


def test_figures_of_the_same_images_move_together():
    """A difference of 0.1 between columns that vary by 10 from image to image is seen, and so is a ratio of 2."""
    hard = np.random.default_rng(2).uniform(1, 10, 15)
    one, other = (estimate(lambda mean: mean, column) for column in (hard, hard + 0.1))
    assert (other - one).ci95 == pytest.approx([0.1, 0.1])
    assert (estimate(lambda mean: mean, 2 * hard) / one).ci95 == pytest.approx([2, 2])
    (_, high), (low, _) = one.ci95, other.ci95
    assert high > low, "their own intervals overlap"
    with pytest.raises(AssertionError, match="different images"):
        one - estimate(lambda mean: mean, hard[:5])


def test_what_is_not_defined_is_left_out():
    nothing = estimate(ratio, np.zeros(4), np.zeros(4))
    assert nothing.to_json() == {"value": None, "ci95": [None, None], "n": 4}
    only_first = estimate(ratio, np.array([3.0, 0, 0, 0]), np.array([1.0, 0, 0, 0]))
    assert np.isnan(only_first.samples).any()
    assert only_first.to_json() == {"value": 3, "ci95": [3, 3], "n": 4}
    with_zero = estimate(ratio, np.ones(3), np.array([0.0, 0.0, 1.0]))
    low, high = with_zero.ci95
    assert low == pytest.approx(1), "all three draws are the last image, in more than one resample of forty"
    assert high == np.inf
    assert relative_l2(np.array([0.0, 4.0]), np.array([0.0, 1.0])).tolist() == [0, 2]


def test_squares_are_of_each_image_over_its_copies():
    found, wanted = (np.random.default_rng(seed).normal(size=(6, 5, 2)).astype(np.float32) for seed in (3, 4))
    error, power = squares(found, wanted, 3)  # rows 0 and 3 are those of the first image
    for image in range(3):
        rows = [image, image + 3]
        assert error[image] == pytest.approx(np.square(found[rows].astype(float) - wanted[rows]).sum())
        assert power[image] == pytest.approx(np.square(wanted[rows].astype(float)).sum())


def test_figures_are_written_as_plain_data(columns):
    found = to_json([{"a": estimate(relative_l2, *columns)}])
    assert json.loads(json.dumps(found)) == found
    assert np.array(found[0]["a"]["ci95"]).shape == (3, 2, 2)
    assert found[0]["a"]["n"] == 12
