"""What a student is trained on: TopKLD in three variants, and the baselines that must stand beside it.

TopKLD is of "Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models" (arXiv:2501.06218). **Its
equation could not be read**, only descriptions: it "balances implicit and explicit knowledge", and the sampler's top-k
is its parameter. The reading here: a sampler draws from the teacher's k most likely tokens only (VAR: 900 of 4096), so
these, the *head* T, are explicit knowledge, and the *tail* is implicit. The three variants are reconstructions, not the
paper's formula:

- ``split``    Σ_{i∈T} [p log(p/q) − p + q] + Σ_{i∉T} [q log(q/p) − q + p]: forward on the head, reverse on the tail
- ``mixed``    γ · KL(q‖p) + (1 − γ) · KL(p‖q), γ = Σ_{i∈T} p_i, the teacher's mass on the head, position by position (a
               relative is BitDistiller's CAKLD, arXiv:2402.10631, whose γ is one number, measured beforehand)
- ``boosted``  KL(p‖q) + λ · KL(p̃‖q̃), p̃ and q̃ renormalised on T

Baselines: ``forward`` KL(p‖q), ``reverse`` KL(q‖p), ``js`` ½ KL(p‖m) + ½ KL(q‖m) with m = (p + q)/2, ``logit-mse``
Σ (z_p − z_q)² / V, and ``cross-entropy`` −log q(token), which does not ask the teacher.

p = softmax(z_p) is the teacher's distribution and gets no gradient; q = softmax(z_q) is the student's. Limits: at K = V
``split`` is ``forward``, ``mixed`` is ``reverse`` and ``boosted`` (1 + λ) times ``forward``, which it is at λ = 0 too.
All but the cross-entropy are ≥ 0, and 0 exactly where the logits are equal.

Each loss gives its value and its gradient by the student's logits, both in closed form: with g = ∂loss/∂log q it is
g − q Σ g. Logits may be bf16, fp16, fp32 or fp64; everything is computed in fp32 (fp64 stays fp64), from log-softmax.
Legend: … positions, V vocabulary, K head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qexport.distill.by_rows import by_rows
from qexport.distill.divergence import Pair, divergence
from qexport.errors import InputError
from qexport.suggest import nearest

DEFAULT_TOP_K = 900
"""Candidates of the published VAR sampler."""

TOPK_LOSSES = ("split", "mixed", "boosted")
"""The variants of TopKLD: those that a K belongs to."""

ValueAndSlope = tuple[Tensor, Tensor]
"""The loss of each position (…), and its gradient by the student's logits (…, V); from logits (…, V) of both."""


@dataclass(frozen=True)
class Distillation:
    """Which loss, with which K (capped to the vocabulary) and, for ``boosted``, which λ.

    Raises:
        InputError: an unknown loss, K below 1, or a λ that is negative or not finite.
    """

    loss: str = "split"
    top_k: int = DEFAULT_TOP_K
    boost: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InputError(f"loss {self.loss!r} is unknown{nearest(self.loss, LOSSES)}; one of {', '.join(LOSSES)}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise InputError(f"top-k {self.top_k!r} of the loss is not an integer of at least 1")
        if not 0 <= self.boost < math.inf:
            raise InputError(f"boost {self.boost} of the loss must be 0 or greater, and finite")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher's logits."""
        return self.loss != "cross-entropy"

    def __call__(self, teacher: Tensor, student: Tensor, tokens: Tensor) -> Tensor:
        """The loss of each position, (…) float32, from logits (…, V) of both and tokens (…) int64.

        Raises:
            InputError: shapes that do not fit: the teacher is not of the student's model.
        """
        if teacher.shape != student.shape or tokens.shape != student.shape[:-1]:
            shapes = f"{tuple(teacher.shape)} and {tuple(student.shape)}, tokens {tuple(tokens.shape)}"
            raise InputError(f"logits of teacher and student have shapes {shapes}; they are not the same model")
        return by_rows(self._rows, teacher.detach(), student, tokens)

    def _rows(self, teacher: Tensor, student: Tensor, tokens: Tensor) -> ValueAndSlope:
        return LOSSES[self.loss](_at_least_float32(teacher), _at_least_float32(student), tokens, self)


def forward_kl(teacher: Tensor, student: Tensor) -> ValueAndSlope:
    """KL(p‖q) = Σ p log(p/q) in nats; gradient q − p."""
    pair = Pair(teacher, student)
    return pair.forward_terms().sum(-1), pair.through_softmax(pair.q - pair.p)


def reverse_kl(teacher: Tensor, student: Tensor) -> ValueAndSlope:
    """KL(q‖p) in nats; gradient q · (log(q/p) − KL(q‖p))."""
    pair = Pair(teacher, student)
    return pair.reverse_terms().sum(-1), pair.through_softmax(pair.reverse_slope())


def jensen_shannon(teacher: Tensor, student: Tensor) -> ValueAndSlope:
    """½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2, in nats and at most ln 2; gradient ½ q · (log(q/m) − KL(q‖m))."""
    pair = Pair(teacher, student)
    log_m = torch.logaddexp(pair.log_p, pair.log_q) - math.log(2)
    m, from_p, from_q = log_m.exp(), pair.log_p - log_m, pair.log_q - log_m
    values = divergence(pair.p, m, from_p, pair.plain) + divergence(pair.q, m, from_q, pair.plain)
    slope = pair.q * from_q if pair.plain else torch.where(pair.q == 0, 0.0, pair.q * from_q)
    return values.sum(-1) / 2, pair.through_softmax(slope) / 2


def logit_mse(teacher: Tensor, student: Tensor) -> ValueAndSlope:
    """Mean over V of the squared difference of logits. Unlike all others it sees a constant added to all of them."""
    difference = student - teacher
    return difference.square().mean(-1), difference * (2 / difference.shape[-1])


def cross_entropy(student: Tensor, tokens: Tensor) -> ValueAndSlope:
    """−log q(token) in nats from tokens (…) int64; gradient q − 1 at the token, q elsewhere."""
    log_q, index = torch.log_softmax(student, -1), tokens[..., None]
    minus_one = torch.full_like(index, -1, dtype=log_q.dtype)
    return -log_q.gather(-1, index)[..., 0], log_q.exp().scatter_add_(-1, index, minus_one)


def split(teacher: Tensor, student: Tensor, k: int) -> ValueAndSlope:
    """Variant A; its gradient with respect to log q is q − p on the head and q · log(q/p) on the tail."""
    pair = Pair(teacher, student)
    terms, slope = pair.parted(head_mask(teacher, k))
    return terms.sum(-1), pair.through_softmax(slope)


def mixed(teacher: Tensor, student: Tensor, k: int) -> ValueAndSlope:
    """Variant B; its gradient is γ times that of `reverse_kl` and 1 − γ times that of `forward_kl`."""
    if k >= teacher.shape[-1]:
        return reverse_kl(teacher, student)
    pair = Pair(teacher, student)
    gamma = (pair.p * head_mask(teacher, k)).sum(-1, keepdim=True).clamp_max(1)
    values = gamma * pair.reverse_terms() + (1 - gamma) * pair.forward_terms()
    slope = gamma * pair.reverse_slope() + (1 - gamma) * (pair.q - pair.p)
    return values.sum(-1), pair.through_softmax(slope)


def boosted(teacher: Tensor, student: Tensor, k: int, boost: float) -> ValueAndSlope:
    """Variant C; its gradient is q − p, and on the head λ (q̃ − p̃) more."""
    head_p, index = teacher.topk(min(k, teacher.shape[-1]), sorted=False)
    values, slope = forward_kl(teacher, student)
    on_head, head_slope = forward_kl(head_p, student.gather(-1, index))
    return values + boost * on_head, slope.scatter_add_(-1, index, boost * head_slope)


def head_mask(teacher: Tensor, k: int) -> Tensor:
    """True (…, V) on the k most likely tokens of each position; exactly k of them, also where logits are equal."""
    if k >= teacher.shape[-1]:
        return torch.ones_like(teacher, dtype=torch.bool)
    if teacher.device.type != "cpu":
        return torch.zeros_like(teacher, dtype=torch.bool).scatter_(-1, teacher.topk(k, sorted=False).indices, True)
    edge = torch.from_numpy(np.partition(teacher.numpy(), -k, axis=-1)[..., -k, None])  # less than topk takes
    mask = teacher >= edge
    if bool((mask.sum(-1) == k).all()):
        return mask
    mask, equal = teacher > edge, teacher == edge  # usual in bfloat16: of those at the edge the first
    return mask | equal & (equal.cumsum(-1, dtype=torch.int32) <= k - mask.sum(-1, keepdim=True))


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Distillation], ValueAndSlope]] = {
    "split": lambda p, q, tokens, given: split(p, q, given.top_k),
    "mixed": lambda p, q, tokens, given: mixed(p, q, given.top_k),
    "boosted": lambda p, q, tokens, given: boosted(p, q, given.top_k, given.boost),
    "forward": lambda p, q, tokens, given: forward_kl(p, q),
    "reverse": lambda p, q, tokens, given: reverse_kl(p, q),
    "js": lambda p, q, tokens, given: jensen_shannon(p, q),
    "logit-mse": lambda p, q, tokens, given: logit_mse(p, q),
    "cross-entropy": lambda p, q, tokens, given: cross_entropy(q, tokens),
}
"""Every loss by its name."""


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
