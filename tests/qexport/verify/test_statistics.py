"""Moments of features that come in batches, and the files that hold them."""

from __future__ import annotations

import numpy as np
import pytest
from feature_support import WIDTH

from qexport.errors import InputError
from qexport.verify.statistics import Moments, read_statistics, write_statistics

SHA = "ab" * 32


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
