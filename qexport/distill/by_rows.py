"""A loss and its gradient in one pass, a few positions at a time, so that temporaries stay in a processor's cache.

A loss of V = 4096 logits makes a dozen temporaries of the logits' size, each of which would travel to memory and back.
Taken 32 positions at a time they do not, and with the gradient of each position computed beside its value, the gradient
is all that is kept for the backward pass.

Legend: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_VALUES = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Numbers at a time: 512 KiB of float32. From a quarter to eight times of it the speed is about the same. A GPU has no
such cache, and each of its kernels a price: 256 MiB there, not measured."""

RowLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits (N, V) of teacher and student, tokens (N,) → losses (N,), their gradients by student (N, V)."""


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: RowLoss, teacher_NV: Tensor, student_NV: Tensor, tokens_N: Tensor) -> Tensor:
        rows = max(1, _VALUES.get(student_NV.device.type, _VALUES["cpu"]) // student_NV.shape[-1])
        wanted = ctx.needs_input_grad[2]
        parts, gradient = [], torch.empty_like(student_NV) if wanted else None
        for start in range(0, len(student_NV), rows):
            chosen = slice(start, start + rows)
            values, slopes = loss(teacher_NV[chosen], student_NV[chosen], tokens_N[chosen])
            if gradient is not None:
                gradient[chosen] = slopes
            parts.append(values)
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.rows = rows
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient)
        for part, outer, own in zip(*(t.split(ctx.rows) for t in (scaled, gradients[0], gradient)), strict=True):
            part.copy_(outer[:, None] * own)  # bfloat16 times float32: as a whole it takes a copy of all in float32
        return None, None, scaled, None


def by_rows(loss: RowLoss, teacher: Tensor, student: Tensor, tokens: Tensor) -> Tensor:
    """`loss` of logits (…, V) and tokens (…), position by position; differentiable once in the student's logits."""
    width = student.shape[-1]
    values = _ByRows.apply(loss, teacher.reshape(-1, width), student.reshape(-1, width), tokens.reshape(-1))
    assert isinstance(values, Tensor)
    return values.reshape(tokens.shape)
