import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats

from qexport.errors import InputError
from qexport.numerics import metrics
from qexport.numerics.metrics import (
    cross_entropy,
    frechet_distance,
    kl_divergence,
    relative_l2,
    sqnr_db,
    top1_agreement,
    topk_agreement,
)


@pytest.fixture(params=[1 << 20, 16], ids=["one chunk", "many chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_VALUES", request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.usefixtures("_chunks")
class TestDistances:
    def test_by_hand(self):
        assert relative_l2([3.0, 4.0, 1.0], [3.0, 4.0, 0.0]) == pytest.approx(1 / 5)
        assert sqnr_db([1.1], [1.0]) == pytest.approx(20.0)

    def test_against_numpy(self, rng):
        a, ref = rng.standard_normal((2, 7, 9)).astype(np.float32)
        expected = np.linalg.norm((a - ref.astype(np.float64)).ravel()) / np.linalg.norm(ref.astype(np.float64).ravel())
        assert relative_l2(a, ref) == pytest.approx(expected, rel=1e-12)

    def test_a_doubled_scale_is_seen(self, rng):
        ref = rng.standard_normal(100)
        assert relative_l2(2 * ref, ref) == pytest.approx(1.0)

    def test_equal_zero_and_reference_zero(self):
        assert relative_l2(np.zeros(3), np.zeros(3)) == 0
        assert relative_l2(np.ones(3), np.zeros(3)) == math.inf
        assert sqnr_db(np.ones(3), np.ones(3)) == math.inf

    def test_nan_passes_no_limit(self):
        for a, ref in [([np.nan, 1], [1, 1]), ([1, 1], [np.nan, 1]), ([np.inf, 1], [np.inf, 1]), ([np.nan], [0.0])]:
            assert math.isnan(relative_l2(a, ref))
        assert math.isnan(sqnr_db([np.nan, 1], [1, 1]))

    def test_small_errors_of_many_fp16_values_do_not_vanish(self):
        # In float16 both sums would overflow or stall.
        ref = np.full(100_000, 100.0, np.float16)
        a = ref.copy()
        a[0] = 101
        assert relative_l2(a, ref) == pytest.approx(1 / (100 * math.sqrt(100_000)), rel=1e-12)


@pytest.mark.usefixtures("_chunks")
class TestPredictions:
    def test_kl_by_hand(self):
        p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
        expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
        assert kl_divergence(np.log(p), np.log(q)) == pytest.approx(expected, rel=1e-14)

    def test_kl_against_scipy(self, rng):
        p, q = rng.standard_normal((2, 3, 5, 11)) * 4
        reference = scipy.stats.entropy(scipy.special.softmax(p, -1), scipy.special.softmax(q, -1), axis=-1).mean()
        assert kl_divergence(p, q) == pytest.approx(reference, rel=1e-10)
        assert kl_divergence(q, p) != pytest.approx(reference, rel=1e-3)  # it has a direction

    def test_kl_ignores_a_shift_and_sees_a_scale(self, rng):
        p = rng.standard_normal((20, 11))
        assert kl_divergence(p, p + 100) == pytest.approx(0, abs=1e-12)
        assert kl_divergence(p, 2 * p) > 0.1
        assert kl_divergence(p, p) == 0

    def test_kl_is_stable_for_great_logits(self):
        assert kl_divergence([[1000.0, 0.0]], [[1000.0, 1000.0]]) == pytest.approx(math.log(2))
        assert kl_divergence([[-1e4, -1e4]], [[-1e4, -1e4 + 1]]) == pytest.approx(
            scipy.stats.entropy([0.5, 0.5], scipy.special.softmax([0, 1]))
        )

    def test_kl_with_filtered_logits(self):
        inf = math.inf
        assert kl_divergence([[0.0, 0.0, -inf]], [[0.0, 0.0, 0.0]]) == pytest.approx(math.log(1.5))
        assert kl_divergence([[0.0, 0.0, -inf]], [[0.0, 0.0, -inf]]) == 0
        assert kl_divergence([[0.0, 0.0]], [[0.0, -inf]]) == inf

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonsense_passes_no_limit(self, bad):
        good, broken = np.zeros((3, 4)), np.zeros((3, 4))
        broken[1, 2] = bad
        assert math.isnan(kl_divergence(good, broken))
        assert math.isnan(kl_divergence(broken, good))
        assert math.isnan(cross_entropy(broken, [0, 0, 0]))
        if math.isnan(bad):
            assert math.isnan(top1_agreement(good, broken))
            assert math.isnan(topk_agreement(good, broken, 2))

    def test_top1_by_hand(self):
        p = [[1, 2, 3], [3, 2, 1], [5, 5, 0]]
        q = [[0, 0, 9], [0, 9, 0], [7, 1, 0]]
        assert top1_agreement(p, q) == pytest.approx(2 / 3)

    def test_topk_by_hand(self):
        p = [[9, 8, 7, 0], [0, 1, 2, 3]]
        q = [[9, 0, 8, 7], [3, 2, 1, 0]]
        assert topk_agreement(p, q, 2) == pytest.approx((1 + 0) / 4)
        assert topk_agreement(p, q, 4) == 1

    @pytest.mark.parametrize("k", [1, 3, 11])
    def test_topk_against_stable_sorting_with_many_ties(self, rng, k):
        p, q = rng.integers(0, 4, (2, 30, 11)).astype(np.float32)
        tops = [np.argsort(-x, axis=-1, kind="stable")[:, :k] for x in (p, q)]
        expected = np.mean([len(set(a) & set(b)) / k for a, b in zip(*tops, strict=True)])
        assert topk_agreement(p, q, k) == pytest.approx(expected)
        if k == 1:
            assert topk_agreement(p, q, k) == top1_agreement(p, q)

    def test_cross_entropy_against_scipy(self, rng):
        logits, tokens = rng.standard_normal((4, 5, 11)).astype(np.float32), rng.integers(0, 11, (4, 5))
        log_p = scipy.special.log_softmax(logits.astype(np.float64), -1)
        expected = -np.mean([log_p[i, j, tokens[i, j]] for i in range(4) for j in range(5)])
        assert cross_entropy(logits, tokens) == pytest.approx(expected, rel=1e-12)
        assert cross_entropy(np.zeros((1, 8)), [3]) == pytest.approx(math.log(8))


class TestFrechet:
    @staticmethod
    def reference(mu1, cov1, mu2, cov2):
        root = scipy.linalg.sqrtm(cov1 @ cov2)
        return float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * root.real))

    def test_one_dimension_by_hand(self):
        # Normal(0, 3²) and Normal(4, 1): 4² + (3 − 1)².
        assert frechet_distance([0.0], [[9.0]], [4.0], [[1.0]]) == pytest.approx(20)

    def test_against_sqrtm(self, rng):
        x, y = rng.standard_normal((2, 50, 6)) @ rng.standard_normal((6, 6)) + rng.standard_normal((2, 1, 6))
        moments = (x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert frechet_distance(*moments) == pytest.approx(self.reference(*moments), rel=1e-9)

    def test_is_zero_for_the_same_and_symmetric(self, rng):
        x, y = rng.standard_normal((2, 20, 6))
        a, b = (x.mean(0), np.cov(x.T)), (y.mean(0), np.cov(y.T))
        assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-12)
        assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)

    def test_singular_covariances(self, rng):
        # Fewer samples than features, and a rank-one pair with a closed form: C = u uᵀ, D = v vᵀ → tr √(CD) = |u·v|.
        u, v = rng.standard_normal((2, 5))
        zero = np.zeros(5)
        expected = u @ u + v @ v - 2 * abs(u @ v)
        assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(zero, np.zeros((5, 5)), zero, np.eye(5)) == pytest.approx(5)

    def test_a_doubled_covariance_is_seen(self):
        assert frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), 4 * np.eye(3)) == pytest.approx(3)

    def test_what_is_no_covariance_is_refused(self):
        zero, eye = np.zeros(2), np.eye(2)
        with pytest.raises(InputError, match="first covariance is not positive semidefinite"):
            frechet_distance(zero, np.diag([1.0, -1.0]), zero, eye)
        with pytest.raises(InputError, match="second covariance is not symmetric"):
            frechet_distance(zero, eye, zero, np.array([[1.0, 0.5], [0.0, 1.0]]))
        with pytest.raises(InputError, match="do not fit together"):
            frechet_distance(zero, eye, np.zeros(3), np.eye(3))

    def test_nan_passes_no_limit(self):
        assert math.isnan(frechet_distance([np.nan], [[1.0]], [0.0], [[1.0]]))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="cannot compare"):
        relative_l2(np.zeros((2, 1)), np.zeros(2))
    for compare in (kl_divergence, top1_agreement, lambda p, q: topk_agreement(p, q, 1)):
        with pytest.raises(InputError, match="cannot compare"):
            compare(np.zeros((2, 3)), np.zeros((1, 3)))
        with pytest.raises(InputError, match="cannot compare"):
            compare(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(InputError, match="do not fit"):
        cross_entropy(np.zeros((2, 3)), [0])
    with pytest.raises(InputError, match="must be integers"):
        cross_entropy(np.zeros((2, 3)), [0.0, 1.0])
    for tokens in ([0, 3], [-1, 0]):
        with pytest.raises(InputError, match="the vocabulary is 0 to 2"):
            cross_entropy(np.zeros((2, 3)), tokens)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_vocabulary_is_refused(k):
    with pytest.raises(InputError, match="k is"):
        topk_agreement(np.zeros((1, 3)), np.zeros((1, 3)), k)
