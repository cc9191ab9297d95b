"""The Inception Score of logits, against SciPy and cases worked by hand; no network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special

from qexport.errors import InputError
from qexport.verify.inception_figures import inception_score


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
