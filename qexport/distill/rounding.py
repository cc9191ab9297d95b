"""Rounding with a gradient: the straight-through estimator, with step sizes that learn (LSQ).

Esser et al. 2019, "Learned step size quantization" (arXiv:1902.08153), equations 1 to 4: with v = w / s and the code
c = clamp(round(v), c_min, c_max), ŵ = s · c,

    ∂ŵ/∂w = 1 where c_min ≤ v ≤ c_max, else 0
    ∂ŵ/∂s = c − v there, c elsewhere;   the gradient of s is multiplied by 1 / √(N · c_max)

N numbers share s, and c_max is the format's greatest value. Going beyond the paper: s may be negative (see
`qexport.formats`), a floating-point format is rounded to its own grid, and a weight's scale is rounded to fp16 *inside*
the forward pass, straight through too, so that what is trained is what is stored.

Shape suffixes: O outputs, I inputs, R rows of scales, G groups along the input.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexport.distill import processes
from qexport.formats import SCALE_DTYPE, NumberFormat
from qexport.reference.fake_quant import fake_quantise, round_to
from qexport.scheme import PerToken
from qexport.solution import LEAST_TOKEN_SCALE, Activation

_LEAST_SCALE = float(np.finfo(SCALE_DTYPE).smallest_subnormal)
"""2⁻²⁴, the least that fp16 holds: a learned scale may cross to the other sign, but is never stored as 0."""

_GREATEST_SCALE = float(np.finfo(SCALE_DTYPE).max)


def stored_scale(scale: Tensor) -> Tensor:
    """The fp16 number that a learned scale is stored as, in float32; never 0 or infinite."""
    magnitude = scale.abs().clamp(_LEAST_SCALE, _GREATEST_SCALE).half().float()
    return torch.where(scale < 0, -magnitude, magnitude)


def _limits(number_format: NumberFormat) -> tuple[float, float]:
    if number_format.kind == "int":
        return number_format.code_min, number_format.code_max
    return -number_format.float_max, number_format.float_max


def _lsq_factor(shared: int, number_format: NumberFormat) -> float:
    return 1 / math.sqrt(shared * number_format.greatest)


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_OI: Tensor, scale_RG: Tensor, number_format: NumberFormat) -> Tensor:
        ctx.save_for_backward(w_OI, scale_RG)
        ctx.number_format = number_format
        scale = stored_scale(scale_RG)[..., None]
        codes = round_to(w_OI.reshape(*scale_RG.shape, -1) / scale, number_format)
        rounded_OI = torch.empty_like(w_OI, memory_format=torch.contiguous_format)
        torch.mul(codes, scale, out=rounded_OI.view(codes.shape))  # no view is returned: fully_shard wants none
        return rounded_OI

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        w_OI, scale_RG = ctx.saved_tensors
        gradient = gradients[0].reshape(*scale_RG.shape, -1)
        v = w_OI.reshape(*scale_RG.shape, -1) / stored_scale(scale_RG)[..., None]
        low, high = _limits(ctx.number_format)
        inside = (v >= low) & (v <= high)
        by_scale = None
        if ctx.needs_input_grad[1]:
            codes = round_to(v, ctx.number_format)
            by_scale = (gradient * (codes - v * inside)).sum(-1) * _lsq_factor(v.shape[-1], ctx.number_format)
        return (gradient * inside).reshape(w_OI.shape), by_scale, None


def rounded_weight(w_OI: Tensor, scale_RG: Tensor, number_format: NumberFormat) -> Tensor:
    """ŵ (O, I) float32 of latent weights and scales, in the full range of codes; differentiable in both."""
    result = _RoundedWeight.apply(w_OI, scale_RG, number_format)
    assert isinstance(result, Tensor)
    return result


class Rounder(nn.Module):
    """The latent weight and the scales of one layer; called, it gives the rounded weight.

    A module of its own, so that it can be divided among processes: `fully_shard` gathers a module's parameters around
    its call, and around its part of the backward pass.
    """

    def __init__(self, latent_OI: nn.Parameter, scale_RG: nn.Parameter, number_format: NumberFormat) -> None:
        """Take the parameters, and the format of the codes."""
        super().__init__()
        self.latent, self.scale = latent_OI, scale_RG
        self._format = number_format

    def forward(self) -> Tensor:
        """ŵ (O, I)."""
        return rounded_weight(self.latent, self.scale, self._format)


class _RoundedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, activation: Activation) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.activation = activation
        return fake_quantise(x, activation, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        activation: Activation = ctx.activation
        if scale is None:  # a token's own greatest magnitude lies inside, and its scale is taken as it is
            return gradients[0], None, None
        number_format = activation.spec.format
        low, high = (limit - activation.zero_point for limit in _limits(number_format))
        v = x / scale
        inside = (v >= low) & (v <= high)
        by_scale = None
        if ctx.needs_input_grad[1]:
            codes = round_to(v, number_format, activation.zero_point) - activation.zero_point
            spread = gradients[0] * (codes - v * inside)
            by_scale = _sum_to(spread, scale.shape) * _lsq_factor(_shared(x, scale), number_format)
        return gradients[0] * inside, by_scale, None


def rounded_activation(x: Tensor, activation: Activation, scale: Tensor | None) -> Tensor:
    """What a layer sees of x, as `fake_quantise`, differentiable in x and in the scale (None for those per token).

    `scale` broadcasts to x along leading axes of its own and stands for the activation's.
    """
    assert (scale is None) == isinstance(activation.spec.scales, PerToken)
    held = None if scale is None else scale.clamp_min(LEAST_TOKEN_SCALE)
    result = _RoundedActivation.apply(x, held, activation)
    assert isinstance(result, Tensor)
    return result


def _shared(x: Tensor, scale: Tensor) -> int:
    """How many numbers of the whole batch share a scale, of which this process may have a part."""
    by_sample = scale.ndim == x.ndim and scale.shape[0] == x.shape[0]
    return x.numel() // scale.numel() * (1 if by_sample else processes.world())


def _sum_to(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the axes along which a tensor of `shape` was broadcast."""
    return values.sum_to_size(shape) if shape else values.sum()
