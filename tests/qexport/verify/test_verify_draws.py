"""The judgement of draws against cases worked out by hand, and against a sampler written the plain way."""

from __future__ import annotations

import numpy as np
import pytest

from qexport.verify.draws import Sampling, can_be_drawn, summation_allowance

P = np.array([0.1, 0.2, 0.3, 0.4])
ALL = Sampling(top_k=0, top_p=0.0, temperature=1.0)


def judge(u: float, token: int, sampling: Sampling = ALL, error: float = 0.0, p: np.ndarray = P) -> bool:
    logits = np.log(p).astype(np.float32)
    return bool(can_be_drawn(logits[None], [u], [token], sampling, error)[0])


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.05, 0), (0.15, 1), (0.29, 1), (0.31, 2), (0.61, 3), (0.9999, 3)])
def test_only_the_token_whose_share_holds_u(u: float, token: int) -> None:
    assert [judge(u, t) for t in range(4)] == [t == token for t in range(4)]


def test_both_tokens_at_a_boundary() -> None:
    assert judge(0.1, 0)
    assert judge(0.1, 1)
    assert not judge(0.1, 2)


def test_boundary_moves_with_the_logit_error() -> None:
    # F(0) = 0.1; logits wrong by ± 1e-3 move it by up to 2e-3 · 0.1 · 0.9 = 1.8e-4.
    assert not judge(0.1 + 1.5e-4, 0)
    assert judge(0.1 + 1.5e-4, 0, error=1e-3)
    assert not judge(0.1 + 2.5e-4, 0, error=1e-3)


def test_temperature_divides_the_logits_and_their_error() -> None:
    flat = Sampling(0, 0.0, temperature=2.0)
    share = np.sqrt(P) / np.sqrt(P).sum()
    assert judge(share[0] - 1e-3, 0, flat)
    assert not judge(share[0] + 1e-3, 0, flat)
    assert not judge(share[0] + 1.5e-4, 0, flat, error=1e-3)
    assert judge(share[0] + 1.5e-4, 0, flat, error=2e-3)


def test_top_k() -> None:
    two = Sampling(top_k=2, top_p=0.0, temperature=1.0)
    assert [judge(0.42, t, two) for t in range(4)] == [False, False, True, False]  # 3/7 = 0.4286
    assert [judge(0.44, t, two) for t in range(4)] == [False, False, False, True]


def test_top_k_boundary_within_the_logit_error() -> None:
    p = np.array([0.1, 0.3 * (1 - 1e-4), 0.3, 0.4])
    two = Sampling(top_k=2, top_p=0.0, temperature=1.0)
    assert not judge(0.01, 1, two, p=p)
    assert not judge(0.01, 1, two, error=2e-5, p=p)
    assert judge(0.01, 1, two, error=6e-5, p=p)  # 2 · 6e-5 > 1e-4
    assert judge(0.01, 2, two, error=6e-5, p=p), "the reference's own token stays possible"
    assert not judge(0.01, 0, two, error=6e-5, p=p)


def test_top_k_ties_all_stay() -> None:
    p = np.array([0.2, 0.3, 0.3, 0.2])
    one = Sampling(top_k=1, top_p=0.0, temperature=1.0)
    assert judge(0.2, 1, one, p=p)
    assert judge(0.8, 2, one, p=p)
    assert not judge(0.2, 0, one, p=p)


def test_top_p() -> None:
    nucleus = Sampling(top_k=0, top_p=0.65, temperature=1.0)  # 0.4 + 0.3 reaches it
    assert [judge(0.42, t, nucleus) for t in range(4)] == [False, False, True, False]
    wider = Sampling(top_k=0, top_p=0.75, temperature=1.0)  # needs 0.2 as well
    assert [judge(0.1, t, wider) for t in range(4)] == [False, True, False, False]


def test_top_p_boundary_within_the_logit_error() -> None:
    nucleus = Sampling(top_k=0, top_p=0.7 - 1e-4, temperature=1.0)
    assert not judge(0.01, 1, nucleus)
    assert judge(0.01, 1, nucleus, error=1e-3)  # 0.7 moves by up to 2e-3 · 0.7 · 0.3 = 4e-4
    assert judge(0.01, 2, nucleus, error=1e-3)


def test_top_p_counts_within_the_top_k() -> None:
    both = Sampling(top_k=3, top_p=0.75, temperature=1.0)  # of 0.9: 0.4/0.9 + 0.3/0.9 = 0.78
    assert [judge(0.1, t, both) for t in range(4)] == [False, False, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_excused(bad: float) -> None:
    assert not can_be_drawn([[0.0, bad, 0.0]], [0.5], [1], ALL)[0]
    assert not can_be_drawn([[0.0, 0.0, 0.0]], [0.5], [1], ALL, np.nan)[0]


@pytest.mark.parametrize("token", [-1, 4])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    assert not judge(0.5, token)


def plain_sampler(logits: np.ndarray, u: float, sampling: Sampling) -> int:
    """Temperature, top-k, top-p and inverse CDF in float64, one row, no shortcuts."""
    x = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(x)), key=lambda v: -x[v])
    kept = order[: sampling.top_k] if sampling.top_k > 0 else order
    if 0 < sampling.top_p < 1:
        mass = np.exp(x[kept] - x.max())
        kept = kept[: int(np.argmax(np.cumsum(mass) >= sampling.top_p * mass.sum())) + 1]
    running = 0.0
    target = u * sum(np.exp(x[v] - x.max()) for v in kept)
    for v in sorted(kept):
        running += np.exp(x[v] - x.max())
        if running > target:
            return v
    return max(kept)


@pytest.mark.parametrize("sampling", [ALL, Sampling(20, 0.0, 1.0), Sampling(0, 0.9, 0.7), Sampling(50, 0.8, 1.3)])
@pytest.mark.parametrize("error", [0.0, 1e-4, 1e-2])
def test_whatever_lies_within_the_error_is_excused(sampling: Sampling, error: float) -> None:
    generator = np.random.default_rng(0)
    drawn, own = 0, 0
    for _ in range(60):
        logits = generator.normal(0, 2, 100).astype(np.float32)
        u = float(np.float32(generator.random()))
        other = logits + generator.uniform(-error, error, 100)
        token = plain_sampler(other, u, sampling)
        assert can_be_drawn(logits[None], [u], [token], sampling, error)[0]
        possible = can_be_drawn(np.repeat(logits[None], 100, 0), [u] * 100, np.arange(100), sampling, error)
        drawn += int(possible.sum())
        own += 1
    assert drawn <= own * (1.1 if error < 1e-2 else 4), "few tokens are possible, or the judgement means nothing"


def test_summation_allowance_is_far_below_a_typical_share() -> None:
    assert summation_allowance(4096) == pytest.approx(1.6e-5, rel=0.05)
    assert summation_allowance(4096) < 0.1 / 4096
