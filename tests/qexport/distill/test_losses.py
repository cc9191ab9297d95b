"""The losses against NumPy in float64, finite differences, closed-form gradients, limits; and mutations of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch import Tensor

from qexport.distill import losses
from qexport.distill.losses import LOSSES, TOPK_LOSSES, Distillation
from qexport.errors import InputError

POSITIONS, VOCABULARY = 5, 24

FLOAT32_RELATIVE = 2e-5
"""Relative error of a float32 sum of 24 terms whose logarithms carry 2⁻²³ · |log p| ≈ 1e-6, some digits to spare."""

DIVERGENCES = tuple(name for name in LOSSES if name != "cross-entropy")


def pair(seed: int = 0, spread: float = 2.0, distance: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a teacher and of a student not far from it, float64, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    z_p = spread * torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64)
    z_q = z_p + distance * torch.randn(POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64)
    return z_p, z_q, torch.randint(VOCABULARY, (POSITIONS,), generator=generator)


def by_hand(name: str, z_p: Tensor, z_q: Tensor, tokens: Tensor, k: int, boost: float) -> np.ndarray:
    """The definitions in NumPy, float64, written as in the header of the module."""
    p, q = softmax(z_p.numpy(), axis=-1), softmax(z_q.numpy(), axis=-1)
    m = (p + q) / 2
    order = np.argsort(-p, axis=-1)
    head = np.zeros_like(p, bool)
    np.put_along_axis(head, order[:, :k], True, axis=-1)
    forward, reverse = rel_entr(p, q).sum(-1), rel_entr(q, p).sum(-1)
    gamma = (p * head).sum(-1)
    head_p, head_q = p * head / gamma[:, None], q * head / (q * head).sum(-1, keepdims=True)
    return {
        "forward": forward,
        "reverse": reverse,
        "js": (rel_entr(p, m).sum(-1) + rel_entr(q, m).sum(-1)) / 2,
        "logit-mse": ((z_p - z_q).numpy() ** 2).mean(-1),
        "cross-entropy": -log_softmax(z_q.numpy(), axis=-1)[np.arange(len(tokens)), tokens.numpy()],
        "split": np.where(head, rel_entr(p, q) - p + q, rel_entr(q, p) - q + p).sum(-1),
        "mixed": gamma * reverse + (1 - gamma) * forward,
        "boosted": forward + boost * rel_entr(head_p, head_q).sum(-1),
    }[name]


@pytest.mark.parametrize("k", [1, 2, 9, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("name", LOSSES)
def test_value_is_the_definition(name: str, k: int) -> None:
    z_p, z_q, tokens = pair()
    loss = Distillation(name, top_k=k, boost=0.6)
    want = by_hand(name, z_p, z_q, tokens, k, 0.6)
    np.testing.assert_allclose(loss(z_p, z_q, tokens).numpy(), want, rtol=1e-12)
    single = loss(z_p.float(), z_q.float(), tokens)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), want, rtol=FLOAT32_RELATIVE)


@pytest.mark.parametrize("k", [1, 7, VOCABULARY])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_against_finite_differences(name: str, k: int) -> None:
    z_p, z_q, tokens = pair(seed=k)
    z_q.requires_grad_(True)
    loss = Distillation(name, top_k=k, boost=0.6)
    assert torch.autograd.gradcheck(lambda z: loss(z_p, z, tokens), (z_q,), eps=1e-6, atol=1e-8, rtol=1e-6)


def gradient(name: str, z_p: Tensor, z_q: Tensor, tokens: Tensor, k: int = 7) -> Tensor:
    student = z_q.clone().requires_grad_(True)
    Distillation(name, top_k=k)(z_p, student, tokens).sum().backward()
    assert student.grad is not None
    return student.grad


def closed_gradient(name: str, z_p: Tensor, z_q: Tensor, tokens: Tensor, k: int) -> Tensor:
    """∂loss/∂z_q on paper: with g = ∂loss/∂log q, it is g − q Σ g."""
    p, q = z_p.softmax(-1), z_q.softmax(-1)
    log_ratio = q.log() - p.log()
    head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.argsort(descending=True)[:, :k], True)
    m = (p + q) / 2
    head_p, head_q = p * head, q * head
    head_p, head_q = head_p / head_p.sum(-1, keepdim=True), head_q / head_q.sum(-1, keepdim=True)
    gamma = (p * head).sum(-1, keepdim=True)
    reverse = q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))
    to_middle = q.log() - m.log()
    by_log_q = torch.where(head, q - p, q * log_ratio)
    return {
        "forward": q - p,
        "reverse": reverse,
        "js": q * (to_middle - (q * to_middle).sum(-1, keepdim=True)) / 2,
        "logit-mse": 2 * (z_q - z_p) / VOCABULARY,
        "cross-entropy": q - torch.nn.functional.one_hot(tokens, VOCABULARY),
        "split": by_log_q - q * by_log_q.sum(-1, keepdim=True),
        "mixed": gamma * reverse + (1 - gamma) * (q - p),
        "boosted": q - p + head_q - head_p,
    }[name]


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_closed_form(name: str) -> None:
    z_p, z_q, tokens = pair(seed=3)
    torch.testing.assert_close(
        gradient(name, z_p, z_q, tokens), closed_gradient(name, z_p, z_q, tokens, 7), rtol=1e-10, atol=1e-14
    )


def test_limits_of_the_variants() -> None:
    z_p, z_q, tokens = pair(seed=4)

    def value(name: str, k: int, boost: float = 1.0) -> Tensor:
        return Distillation(name, top_k=k, boost=boost)(z_p, z_q, tokens)

    beyond = VOCABULARY + 100  # a K of another vocabulary is capped
    for k in (VOCABULARY, beyond):
        torch.testing.assert_close(value("split", k), value("forward", 1), rtol=1e-14, atol=0)
        torch.testing.assert_close(value("mixed", k), value("reverse", 1), rtol=1e-14, atol=0)
        torch.testing.assert_close(value("boosted", k, 0.5), 1.5 * value("forward", 1), rtol=1e-14, atol=0)
    torch.testing.assert_close(value("boosted", 5, 0.0), value("forward", 1), rtol=0, atol=0)
    torch.testing.assert_close(value("boosted", 1), value("forward", 1), rtol=1e-14, atol=0)  # one entry, one mass
    assert not torch.allclose(value("split", 5), value("forward", 1), rtol=1e-3)
    assert not torch.allclose(value("mixed", 1), value("forward", 1), rtol=1e-3)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nought_exactly_where_equal_and_positive_elsewhere(name: str, dtype: torch.dtype) -> None:
    z_p, z_q, tokens = pair(seed=5, distance=1e-2)
    z_p, z_q = z_p.to(dtype), z_q.to(dtype)
    for k in (1, 9, VOCABULARY):
        loss = Distillation(name, top_k=k)
        assert (loss(z_p, z_p.clone(), tokens) == 0).all()
        assert (loss(z_p, z_q, tokens) > 0).all()
        student = z_p.clone().requires_grad_(True)
        loss(z_p, student, tokens).sum().backward()
        assert student.grad is not None
        assert student.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 9, VOCABULARY])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype, k: int) -> None:
    """Certain teachers, certain students, certain of opposite things, far off the origin."""
    z = torch.zeros(POSITIONS, VOCABULARY, dtype=dtype)
    z_p, z_q = z.clone(), z.clone()
    z_p[:, 0], z_q[:, 1] = 300.0, 300.0
    z_p[1] = 1000.0
    z_q[2] = -1000.0
    tokens = torch.zeros(POSITIONS, dtype=torch.int64)
    student = z_q.requires_grad_(True)
    value = Distillation(name, top_k=k)(z_p, student, tokens)
    assert torch.isfinite(value).all()
    value.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_an_impossible_token_of_the_teacher_costs_forward_kl_nothing_but_mass() -> None:
    z_p, z_q, tokens = pair(seed=6)
    z_p[:, 3] = -math.inf
    want = by_hand("forward", z_p, z_q, tokens, 1, 0)
    np.testing.assert_allclose(Distillation("forward")(z_p, z_q, tokens).numpy(), want, rtol=1e-12)
    assert torch.isfinite(gradient("forward", z_p, z_q, tokens)).all()


def test_small_divergences_keep_their_digits_in_float32() -> None:
    """As a difference of logarithms weighed by p, float32 is off by several times the value, and below zero."""
    z_p, z_q, tokens = pair(seed=7, distance=1e-4)
    z_p, z_q = z_p.float(), z_q.float()
    want = by_hand("forward", z_p.double(), z_q.double(), tokens, 1, 0)
    p, log_p, log_q = z_p.softmax(-1), z_p.log_softmax(-1), z_q.log_softmax(-1)
    naive = (p * (log_p - log_q)).sum(-1).numpy()
    assert np.abs(naive / want - 1).max() > 1
    # log-softmax itself is good to about 2⁻²² of logits of 5, a few thousandths of differences of 1e-4
    np.testing.assert_allclose(Distillation("forward")(z_p, z_q, tokens).numpy(), want, rtol=2e-2)


def test_a_head_of_equal_logits_has_exactly_k_tokens() -> None:
    equal = torch.zeros(POSITIONS, VOCABULARY)
    assert (losses.head_mask(equal, 5).sum(-1) == 5).all()


@pytest.mark.parametrize("k", [1, 9, VOCABULARY - 1])
def test_a_head_is_of_the_likeliest(k: int) -> None:
    """The order says so, and among equals at its edge any are taken."""
    logits = pair(seed=9)[0].float()
    want = torch.zeros_like(logits, dtype=torch.bool)
    want.scatter_(-1, logits.argsort(descending=True)[:, :k], True)
    assert torch.equal(losses.head_mask(logits, k), want)
    logits[2] = logits[2].round()
    mask = losses.head_mask(logits, k)
    assert (mask.sum(-1) == k).all()
    assert logits[2][mask[2]].min() >= logits[2][~mask[2]].max()


def swapped(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    pair = losses.Pair(p, q)
    terms, slope = pair.parted(~losses.head_mask(p, k))
    return terms.sum(-1), pair.through_softmax(slope)


def without_linear_terms(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    pair = losses.Pair(p, q)
    head = losses.head_mask(p, k)
    return torch.where(head, pair.p * pair.r, -pair.q * pair.r).sum(-1), pair.parted(head)[1]


@pytest.mark.parametrize("wrong", [swapped, without_linear_terms])
def test_mutations_of_split_fail_the_value_test(monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    monkeypatch.setattr(losses, "split", wrong)
    with pytest.raises(AssertionError):
        test_value_is_the_definition("split", 9)


def test_a_slope_that_skips_the_softmax_fails_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `forward` the slope is the gradient already; of the others it is not."""
    monkeypatch.setattr(losses.Pair, "through_softmax", lambda self, slope: slope)
    for name in ("reverse", "js", "split", "mixed"):
        with pytest.raises(AssertionError):
            test_gradient_is_the_closed_form(name)


@pytest.mark.parametrize("name", LOSSES)
def test_the_careful_forms_are_the_plain_ones(name: str) -> None:
    """One position with a probability of 0 sends all that are computed with it through the careful forms."""
    z_p, z_q, tokens = pair(seed=8)
    assert losses.Pair(z_p, z_q).plain
    loss = Distillation(name, top_k=7, boost=0.6)
    want, wanted_gradient = loss(z_p, z_q, tokens), gradient(name, z_p, z_q, tokens)
    far = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    far[0, 0] = 100.0
    more_p, more_q = torch.cat((z_p, far)), torch.cat((z_q, far))
    assert not losses.Pair(more_p, more_q).plain
    more_tokens = torch.cat((tokens, tokens[:1]))
    torch.testing.assert_close(loss(more_p, more_q, more_tokens)[:-1], want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradient(name, more_p, more_q, more_tokens)[:-1], wanted_gradient, rtol=1e-12, atol=1e-15
    )


def test_teacher_gets_no_gradient() -> None:
    z_p, z_q, tokens = pair()
    z_p.requires_grad_(True)
    z_q.requires_grad_(True)
    for name in LOSSES:
        Distillation(name)(z_p, z_q, tokens).sum().backward()
    assert z_p.grad is None


def test_bad_settings_and_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'split'"):
        Distillation("splitt")
    with pytest.raises(InputError, match="top-k 0"):
        Distillation("split", top_k=0)
    with pytest.raises(InputError, match="boost nan"):
        Distillation("boosted", boost=math.nan)
    z_p, z_q, tokens = pair()
    with pytest.raises(InputError, match="not the same model"):
        Distillation("forward")(z_p[:, :-1], z_q, tokens)
    assert set(TOPK_LOSSES) < set(LOSSES)
