"""FID and the Inception Score of features and logits, against SciPy and cases worked by hand; no network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from qexport.errors import InputError
from qexport.numerics.metrics import frechet_distance
from qexport.verify.inception_figures import _few, _many, frechet, inception_score
from qexport.verify.statistics import Moments, Statistics, read_statistics, write_statistics

WIDTH = 12
SHA = "ab" * 32


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def real(rng):
    x_ND = rng.standard_normal((40, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH)) + 3
    return Statistics(x_ND.mean(axis=0), np.cov(x_ND, rowvar=False), 40, "real")


def features(rng, count):
    return (rng.standard_normal((count, WIDTH)) * 2 + 1).astype(np.float32)


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


class TestInceptionScore:
    def test_against_scipy(self, rng):
        logits = (3 * rng.standard_normal((35, 9))).astype(np.float32)
        order = np.random.RandomState(2020).permutation(35)
        scores = []
        for part in np.split(logits[order].astype(np.float64), [11, 23]):  # ⌊35 i / 3⌋
            p = scipy.special.softmax(part, axis=1)
            scores.append(np.exp(scipy.special.rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()))
        found = inception_score(logits, 3, seed=0)
        assert found.value == pytest.approx(np.mean(scores), rel=1e-9)
        assert found.deviation == pytest.approx(np.std(scores), rel=1e-9)
        assert found.low < found.value < found.high
        assert inception_score(logits, 1, seed=0).value != pytest.approx(found.value, rel=1e-3)

    def test_by_hand(self):
        assert inception_score(np.zeros((20, 5)), 2, 0).value == pytest.approx(1)
        certain = 1e4 * np.tile(np.eye(4, dtype=np.float32), (5, 1))  # p is 0 and 1 exactly
        found = inception_score(certain, 1, 0)
        assert found.value == pytest.approx(4)
        assert math.isfinite(found.low)
        assert found.high >= 4

    def test_parts_do_not_follow_the_order_of_classes(self):
        in_order = 1e4 * np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
        assert inception_score(in_order, 4, 0).value > 3.5  # parts of one class each would score 1

    def test_too_few_images(self):
        with pytest.raises(InputError, match="at least 20 images, not 19"):
            inception_score(np.zeros((19, 5)), 10, 0)
        with pytest.raises(InputError, match="not finite"):
            inception_score(np.full((20, 5), np.inf), 1, 0)


class TestStatistics:
    def test_moments_are_numpys_however_the_batches_fall(self, rng):
        x_ND = (rng.standard_normal((50, WIDTH)) + 1e4).astype(np.float32)
        for cuts in ([], [1], [1, 2, 30], [0, 49]):
            moments = Moments(WIDTH)
            for part in np.split(x_ND, cuts):
                moments.add(part)
            found = moments.result("x")
            np.testing.assert_allclose(found.mu, x_ND.mean(axis=0, dtype=np.float64), rtol=1e-12)
            np.testing.assert_allclose(found.cov, np.cov(x_ND.astype(np.float64), rowvar=False), atol=1e-10)
            assert found.images == 50
        with pytest.raises(InputError, match="at least 2 images, not 0"):
            Moments(WIDTH).result("x")

    def test_what_is_written_is_read(self, tmp_path, real):
        path = tmp_path / "s.npz"
        with path.open("wb") as file:
            write_statistics(file, real, SHA)
        found = read_statistics(path, WIDTH, SHA)
        assert found is not None
        assert found.images == 40
        np.testing.assert_array_equal(found.mu, real.mu)
        np.testing.assert_allclose(found.cov, real.cov, rtol=1e-15)
        with np.load(path) as file:  # the names that other tools read
            np.testing.assert_array_equal(file["sigma"], real.cov)
        with pytest.raises(InputError, match="made with other weights"):
            read_statistics(path, WIDTH, "cd" * 32)

    def test_published_batches_have_images_beside_them(self, tmp_path, real):
        np.savez(tmp_path / "batch.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=real.mu, sigma=real.cov)
        found = read_statistics(tmp_path / "batch.npz", WIDTH, SHA)
        assert found is not None
        assert found.images is None

    def test_images_are_no_statistics(self, tmp_path):
        np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
        assert read_statistics(tmp_path / "images.npz", WIDTH, SHA) is None
        assert read_statistics(tmp_path, WIDTH, SHA) is None

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"sigma": None}, "holds no sigma"),
            ({"mu": np.zeros(3)}, r"mu \(3,\)"),
            ({"mu": np.full(WIDTH, np.nan)}, "mu is float64 or not finite"),
            ({"mu": np.zeros(WIDTH, int)}, "mu is int64"),
            ({"sigma": np.triu(np.ones((WIDTH, WIDTH)))}, "not symmetric"),
            ({"sigma": -np.eye(WIDTH)}, "negative variances"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tmp_path, real, change, says):
        held = {"mu": real.mu, "sigma": real.cov} | change
        np.savez(tmp_path / "s.npz", **{name: array for name, array in held.items() if array is not None})
        with pytest.raises(InputError, match=says):
            read_statistics(tmp_path / "s.npz", WIDTH, SHA)

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 and no more")
        np.save(tmp_path / "bare.npy", np.zeros(3))
        for name in ("s.npz", "bare.npy", "absent.npz"):
            with pytest.raises(InputError, match=f"{name}: cannot be read"):
                read_statistics(tmp_path / name, WIDTH, SHA)
