"""Float64 references for the fp8 operators, in torch, on the operands exactly as the operators round them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from forms import E4M3_MAX, EPSILON, Probe, quantise_weight  # this folder is a script folder, not a package

FP16_LIMIT = 2e-3  # relative L2: fp16 output rounding is 3e-4, Hopper's fp8 accumulation adds up to about 1e-3
FP8_SLACK = 1.1  # an E4M3 result may be this many times further from the exact value than ideal rounding is


def e4m3_round(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return e4m3(x * fl32(1 / scale)) as float64, x of any float type, saturating, half to even."""
    inverse = float(np.float32(1) / np.float32(scale))
    scaled = (x.float() * inverse).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).double()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh in the precision of x."""
    return torch.nn.functional.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Agreement:
    """Relative L2 of one operator against the exact result on its own operands, and against no quantisation at all."""

    name: str
    rows: int
    rel_same_operands: float
    rel_unquantised: float
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the operator computes what it says, up to its arithmetic (NaN does not pass)."""
        return self.rel_same_operands < self.limit


def relative_l2(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64."""
    return float((got.double() - want).norm() / want.norm())


def exact(probe: Probe, values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (result on the operator's rounded operands, result without any quantisation), both float64, unscaled.

    `values` holds the probing model's inputs and outputs; an E4M3 value is there as the number its 8 bits stand for.
    """
    x = values[probe.source]
    layer = probe.layer
    if layer is None:
        v = x.double()
        centred = v - v.mean(-1, keepdim=True)
        normal = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPSILON)
        scale, shift = (values[name].double() for name in probe.modulation)
        y = normal * (1 + scale) + shift
        return y, y
    w_e4m3, w_scale = quantise_weight(layer, probe.per_channel)
    w_q = torch.from_numpy(w_e4m3.astype(np.float32)).to(x.device).double()
    w_q = w_q * torch.from_numpy(w_scale).to(x.device).double()[:, None]
    w = torch.from_numpy(layer.weight).to(x.device).double()
    s = float(np.float32(layer.x_scale))
    q = x.double() if probe.in_fp8 else e4m3_round(x, layer.x_scale)
    whole = x.double() * s if probe.in_fp8 else x.double()
    bias = 0.0 if layer.bias is None else torch.from_numpy(layer.bias).to(x.device).double()
    same, plain = q * s @ w_q.T + bias, whole @ w.T + bias
    return (gelu_tanh(same), gelu_tanh(plain)) if layer.act == "gelu_tanh" else (same, plain)


def compare(probe: Probe, values: dict[str, torch.Tensor]) -> Agreement:
    """Check one operator of a probing model's run."""
    same, plain = exact(probe, values)
    got = values[probe.result].double()
    limit = FP16_LIMIT
    if probe.out_fp8:
        got = got * float(np.float32(probe.y_scale))
        ideal = e4m3_round(same.float(), probe.y_scale) * float(np.float32(probe.y_scale))
        limit = FP8_SLACK * relative_l2(ideal, same)
    name = probe.layer.name if probe.layer is not None else probe.result.removeprefix("probe_")
    rows = got.numel() // got.shape[-1]
    return Agreement(name, rows, relative_l2(got, same), relative_l2(got, plain), limit)
