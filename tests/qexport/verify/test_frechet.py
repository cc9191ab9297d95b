"""The Fréchet distance of features, against SciPy and the plain formula."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from feature_support import WIDTH, features

from qexport.errors import InputError
from qexport.numerics.metrics import frechet_distance
from qexport.verify.fd import _few, _many, frechet
from qexport.verify.statistics import Statistics


def by_scipy(x_ND, real):
    cov = np.cov(x_ND.astype(np.float64), rowvar=False)
    cross = np.sqrt(np.maximum(scipy.linalg.eigvals(cov @ real.cov).real, 0)).sum()
    away = ((x_ND.mean(axis=0, dtype=np.float64) - real.mu) ** 2).sum()
    return away + np.trace(cov) + np.trace(real.cov) - 2 * cross


class TestFrechet:
    @pytest.mark.parametrize("count", [2, 7, WIDTH, WIDTH + 1, 60])  # both ways, and the step between them
    def test_against_scipy(self, rng, real, count):
        x_ND = features(rng, count)
        found = frechet(x_ND, real, "F", seed=0)
        # Eigenvalues that are zero come out as 1e-16 of the greatest, their roots as 1e-8.
        assert found.value == pytest.approx(by_scipy(x_ND, real), rel=1e-6)
        assert found.value != pytest.approx(by_scipy(2 * x_ND, real), rel=1e-2)
        assert (found.images, found.name) == (count, "F")
        assert found.low <= found.value <= found.high

    @pytest.mark.parametrize("count", [8, 60])
    def test_a_resample_is_the_distance_of_its_images(self, rng, real, count):
        x_ND = features(rng, count)
        picked = rng.integers(0, count, count)
        part_ND = x_ND[picked].astype(np.float64)
        expected = frechet_distance(part_ND.mean(axis=0), np.cov(part_ND, rowvar=False), real.mu, real.cov)
        for way in (_few, _many):
            assert way(x_ND, real)(picked) == pytest.approx(expected, rel=1e-6)
            assert way(x_ND, real)(np.arange(count)) != pytest.approx(expected, rel=1e-3)

    def test_the_interval_narrows_with_images_and_repeats_with_the_seed(self, rng, real):
        few, many = (frechet(features(rng, count), real, "F", seed=1) for count in (40, 1000))
        assert many.high - many.low < (few.high - few.low) / 2
        x_ND = features(rng, 20)
        assert frechet(x_ND, real, "F", 3) == frechet(x_ND, real, "F", 3) != frechet(x_ND, real, "F", 4)

    @pytest.mark.parametrize("count", [5, 40])
    def test_what_cannot_be_measured_is_refused(self, rng, real, count):
        with pytest.raises(InputError, match="at least 2"):
            frechet(features(rng, 1), real, "F", 0)
        with pytest.raises(InputError, match="not finite"):
            frechet(np.full((count, WIDTH), np.nan, np.float32), real, "F", 0)
        with pytest.raises(InputError, match="no covariance"):
            frechet(features(rng, count), Statistics(real.mu, -real.cov, 9, "real"), "F", 0)
