"""The building block of the distribution losses: p log(p/q) − p + q, term by term, from logarithms.

    D(p, q) = p · log(p / q) − p + q ≥ 0,    0 exactly where p = q

(the Bregman divergence of x log x; summed over two distributions its linear parts cancel and KL(p‖q) is left). With the
linear parts every *term* is ≥ 0, so that a sum over some of the entries, TopKLD's head or its tail, is a divergence of
its own, and what is summed never cancels. With r = log p − log q it is p · (r + expm1(−r)), which for close p and q is
good to about 2⁻²³ / r where KL written as a difference is good to 2⁻²³ / r².

Both derivatives are known: ∂D/∂log p = p · r and ∂D/∂log q = q − p.

Legend: … positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DIRECT_BELOW = 1.0
"""|r| from which the direct form loses nothing and cannot overflow."""

_PLAIN_ABOVE = -80.0
"""Logarithms above it: float32 holds their exponentials, and those of their differences, without loss."""


class Pair:
    """Teacher's and student's distributions at the same positions, (…, V) each: log p, log q, p, q and
    r = log p − log q.

    `plain` says that no probability is 0 and no ratio overflows. It is asked of a processor only, for which the
    careful forms cost half of a loss; a GPU would have to be waited for.
    """

    def __init__(self, teacher: Tensor, student: Tensor) -> None:
        """Take logits, float32 or float64."""
        self.log_p, self.log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
        self.p, self.q = self.log_p.exp(), self.log_q.exp()
        self.r = self.log_p - self.log_q
        self.plain = student.device.type == "cpu" and bool(
            (self.log_p.amin() > _PLAIN_ABOVE) & (self.log_q.amin() > _PLAIN_ABOVE)
        )

    def forward_terms(self) -> Tensor:
        """D(p, q)."""
        return divergence(self.p, self.q, self.r, self.plain)

    def reverse_terms(self) -> Tensor:
        """D(q, p)."""
        return divergence(self.q, self.p, -self.r, self.plain)

    def reverse_slope(self) -> Tensor:
        """∂D(q, p)/∂log q = −q r, 0 where q is."""
        slope = -self.q * self.r
        return slope if self.plain else torch.where(self.q == 0, 0.0, slope)

    def parted(self, head: Tensor) -> tuple[Tensor, Tensor]:
        """D(p, q) where the mask `head` is True and D(q, p) elsewhere, and its derivative by log q.

        On a processor `torch.where` takes four times as long as a product.
        """
        if not self.plain:
            terms = torch.where(head, self.forward_terms(), self.reverse_terms())
            return terms, torch.where(head, self.q - self.p, self.reverse_slope())
        inside = head.to(self.p.dtype)
        tail_q = (1 - inside).mul_(self.q)
        ratio = (2 * inside).sub_(1).mul_(self.r)
        terms = divergence(torch.addcmul(tail_q, self.p, inside), self.q, ratio, plain=True)  # `b` is not read
        return terms, (self.q - self.p).mul_(inside).addcmul_(tail_q, self.r, value=-1)

    def through_softmax(self, slope: Tensor) -> Tensor:
        """∂/∂logits of the student from ∂/∂log q: g − q Σ g."""
        return torch.addcmul(slope, self.q, slope.sum(-1, keepdim=True), value=-1)


def divergence(a: Tensor, b: Tensor, log_ratio: Tensor, plain: bool = False) -> Tensor:
    """D(a, b) of each entry; `log_ratio` is log a − log b, `plain` as in `Pair`."""
    if plain:
        return torch.expm1(-log_ratio).add_(log_ratio).mul_(a)
    near = log_ratio.clamp(-_DIRECT_BELOW, _DIRECT_BELOW)
    terms = torch.where(log_ratio.abs() < _DIRECT_BELOW, a * (near + torch.expm1(-near)), a * log_ratio - a + b)
    return torch.where(a == 0, b, terms)  # 0 · log 0 = 0, whatever the other logarithm is
