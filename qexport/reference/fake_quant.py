"""Quantised activations in torch: to codes and back, as `qexport.solution.Activation` says and ONNX's operators do.

The quotient is a float32, so ties are those of the rounded quotient, as in `QuantizeLinear`. Codes are whole numbers
(or small floating-point numbers) in a float32 tensor; the product with the scale is rounded to float32 once, as
`DequantizeLinear` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexport.formats import NumberFormat
from qexport.solution import LEAST_TOKEN_SCALE, Activation

_FLOAT32_EXPONENT = 0x7F800000  # sign and mantissa masked away leave the power of two below


def fake_quantise(x: Tensor, activation: Activation, scale: Tensor | None = None) -> Tensor:
    """What a layer sees of its float32 input; `scale` (()) overrides the activation's: that of the current step.

    Per token, the scale is the greatest magnitude along the last axis over the format's greatest; a token of zeros
    stays zero.
    """
    number_format = activation.spec.format
    if scale is None:
        held = activation.scale
        # On the input's device: CUDA divides by a scalar of the CPU as a product with its reciprocal.
        scale = token_scale(x, number_format) if held is None else torch.from_numpy(held).to(x.device)
    codes = round_to(x / scale, number_format, activation.zero_point)
    return (codes - activation.zero_point) * scale


def token_scale(x: Tensor, number_format: NumberFormat) -> Tensor:
    """Scale of each token, (…, 1) float32, at least `LEAST_TOKEN_SCALE`."""
    return (x.abs().amax(dim=-1, keepdim=True) / number_format.greatest).clamp_min(LEAST_TOKEN_SCALE)


def round_to(quotient: Tensor, number_format: NumberFormat, zero_point: int | Tensor = 0) -> Tensor:
    """The nearest code, ties to even, saturated: integers plus `zero_point`, or values of a floating-point format."""
    if number_format.kind == "int":
        return (torch.round(quotient) + zero_point).clamp(number_format.code_min, number_format.code_max)
    held = quotient.clamp(-number_format.float_max, number_format.float_max)
    # Numbers of one binade lie 2^(e − m) apart, and those below the smallest normal as far as in the first binade.
    # Divided by that power of two, which is exact, the nearest even integer is the nearest even mantissa.
    binade = (held.view(torch.int32) & _FLOAT32_EXPONENT).view(torch.float32)
    step = binade.clamp_min(2.0 ** (1 - number_format.exponent_bias)) * 2.0**-number_format.mantissa_bits
    return torch.round(held / step) * step
