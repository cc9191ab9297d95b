"""What calibration found out for a model: all that cannot be computed from the checkpoint and the recipe alone.

It travels in the bundle (``calibration.safetensors``, and the codes in the weight file), so that the quantised model
can be rebuilt in torch without calibrating again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qexport.errors import InputError
from qexport.numerics.quantized import QuantizedTensor
from qexport.remarks import Remark
from qexport.scheme import ActivationSpec, PerStep, PerToken, Static

LEAST_TOKEN_SCALE = float(np.finfo(np.float32).tiny)
"""2⁻¹²⁶, the least normal float32: far below any scale that occurs, and no division by zero."""


@dataclass(frozen=True, eq=False)
class Activation:
    """How one layer's input or output is quantised: ``code = clamp(round_half_even(x / scale) + zero_point)``.

    `scale` is float32: () for `Static`, (steps,) for `PerStep`, None for `PerToken`, whose scale is the token's
    greatest magnitude over `spec.format.greatest`, both in float32, and at least `LEAST_TOKEN_SCALE`, so that a token
    of zeros stays zeros. Integers use the full range, code_min … code_max, which is where ``QuantizeLinear`` saturates;
    symmetric scales are chosen so that the greatest magnitude meets code_max, and code_min is met by values that are
    clipped anyway. Floating-point formats round to nearest even and saturate.

    Raises:
        InputError: a scale of the wrong dtype or shape, or not positive and finite, or a zero point out of range.
    """

    spec: ActivationSpec
    scale: npt.NDArray[np.float32] | None
    zero_point: int = 0

    def __post_init__(self) -> None:
        match self.spec.scales:
            case PerToken():
                good = self.scale is None
            case Static():
                good = self.scale is not None and self.scale.shape == ()
            case PerStep():
                good = self.scale is not None and self.scale.ndim == 1 and self.scale.size > 0
        if not good or (self.scale is not None and self.scale.dtype != np.float32):
            found = None if self.scale is None else f"{self.scale.dtype} {self.scale.shape}"
            raise InputError(f"activation scales are {found}, which does not fit {self.spec}")
        if self.scale is not None and not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise InputError(f"activation scales of {self.spec} must be positive finite numbers")
        number_format = self.spec.format
        if self.zero_point and (
            self.spec.symmetric or not number_format.code_min <= self.zero_point <= number_format.code_max
        ):
            raise InputError(f"zero point {self.zero_point} does not fit {self.spec}")


@dataclass(frozen=True)
class Solution:
    """`weights` by layer name (only those whose algorithm needs to see inputs, shaped (outputs, inputs)), `smooth`
    factors (I,) float32 by name of the fold, `activations` of inputs by layer name, `outputs` of convolutions whose
    output is rounded, bias and all; `remarks` are what was come upon meanwhile.

    `floats` are parameters that stay in floating point and were trained, by ``graph/name``, each as a bundle stores it
    (`qexport.quantize.as_stored`).
    """

    weights: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    smooth: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    activations: Mapping[str, Activation] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    floats: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    outputs: Mapping[str, Activation] = field(default_factory=dict)
