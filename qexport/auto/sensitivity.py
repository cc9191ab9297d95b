"""How much each layer matters: what the model loses when that layer alone is quantised.

For layer l and format f the cost c(l, f) is the judge's figure (KL to the full-precision model, or the denoiser's
output error) with only this layer rounded. Such figures are quadratic in a small error of the weights, so where there
are too many layers to ask about every format, one is measured and the others follow from it by the layer's own relative
squared error: c(l, f) = c(l, f₀) · e(l, f) / e(l, f₀).

Where a scheme rounds the inputs of layers too, the layer's own input is rounded with its weight. What that costs alone,
a(l), is the same in every format, so it is measured once, and only the rest follows the weight's error:
c(l, f) = a(l) + (c(l, f₀) − a(l)) · e(l, f) / e(l, f₀).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.algorithms import get_algorithm
from qexport.auto.alone import input_activations, rounded_weight, with_input
from qexport.compare import Judge, merit
from qexport.errors import InputError
from qexport.family import Generator
from qexport.formats import SCALE_BITS, get_format
from qexport.recipe import Calibration
from qexport.scheme import ActivationSpec, Granularity, PerChannel, PerGroup, TensorSpec
from qexport.solution import Activation

PROBE_ALGORITHM = "mse"
"""Rounds the layer that is asked about: the best that needs no inputs."""

MAX_MEASUREMENTS = 250
"""Runs of the judge; with more pairs of layer and format, `REFERENCE` alone is measured."""


def _spec(name: str, granularity: Granularity) -> TensorSpec:
    return TensorSpec(get_format(name), granularity)


CANDIDATES = (
    _spec("int2", PerGroup(64)),
    _spec("int2", PerGroup(32)),
    _spec("int4", PerGroup(128)),
    _spec("int4", PerGroup(64)),
    _spec("int4", PerGroup(32)),
    _spec("int4", PerGroup(16)),
    _spec("int8", PerChannel()),
)
"""Formats that a runtime stores no wider than they are: int3 would take 4 bits and int6 8."""

REFERENCE = _spec("int4", PerGroup(32))


@dataclass(frozen=True)
class Sensitivity:
    """One layer in one format: `cost` (see module; never negative), its bits on disk, whether it was `measured`.

    `input_cost` is a(l), of rounding the layer's input alone; None where inputs stay as they are.
    """

    layer: str
    spec: TensorSpec
    weights: int
    bits: int
    cost: float
    relative_error: float
    measured: bool
    input_cost: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layer": self.layer,
            "format": self.spec.format.name,
            "granularity": str(self.spec.granularity),
            "weights": self.weights,
            "bits": self.bits,
            "cost": self.cost,
            "relative_error": self.relative_error,
            "measured": self.measured,
            "input_cost": self.input_cost,
        }


def measure_sensitivity(
    generator: Generator,
    layers: Sequence[str],
    judge: Judge,
    candidates: Sequence[TensorSpec] = CANDIDATES,
    progress: Callable[[int, int], None] | None = None,
    *,
    activation: ActivationSpec | None = None,
    calibration: Calibration | None = None,
) -> list[Sensitivity]:
    """Every layer in every candidate format that fits it. `generator` is the full-precision model and is not changed.

    With `activation`, the inputs of the layers are rounded so, with scales measured on `calibration`.

    Raises:
        InputError: a weight is not finite, or no candidate fits a layer.
    """
    probe = copy.deepcopy(generator)
    rounding = get_algorithm(PROBE_ALGORITHM)
    inputs = input_activations(generator, layers, activation, calibration or Calibration()) if activation else {}
    every = len(layers) * (len(candidates) + bool(inputs)) <= MAX_MEASUREMENTS
    found: list[Sensitivity] = []
    for done, layer in enumerate(layers):
        graph, name = probe.layers[layer]
        parameter = probe.graph(graph).parameters()[name]
        w_OI = parameter.detach().clone().numpy()
        power = float(np.square(w_OI, dtype=np.float64).sum()) or 1.0
        own = inputs.get(layer)
        input_cost = _cost(probe, layer, own, judge) if own else None
        rows: list[tuple[TensorSpec, int, float, float | None]] = []
        for spec in candidates:
            if not _fits(spec, w_OI.shape):
                continue
            quantised = rounding(w_OI, spec, name=layer)
            restored = quantised.dequantize()
            error = float(np.square(w_OI - restored, dtype=np.float64).sum()) / power
            cost = None
            if every or spec == REFERENCE:
                with rounded_weight(parameter, restored):
                    cost = _cost(probe, layer, own, judge)
            rows.append((spec, quantised.bits, error, cost))
        if not rows:
            raise InputError(f"{layer}: its width {w_OI.shape[1]} is divided by none of the group sizes on offer")
        found += _with_costs(layer, w_OI.size, rows, input_cost)
        if progress is not None:
            progress(done + 1, len(layers))
    return found


def _cost(probe: Generator, layer: str, activation: Activation | None, judge: Judge) -> float:
    return max(merit(with_input(probe, layer, activation, judge)), 0.0)


def _with_costs(
    layer: str,
    weights: int,
    rows: Sequence[tuple[TensorSpec, int, float, float | None]],
    input_cost: float | None,
) -> list[Sensitivity]:
    known = [(error, cost) for _, _, error, cost in rows if cost is not None]
    if not known:
        raise InputError(f"{layer}: {REFERENCE} does not fit it; its sensitivity cannot be measured")
    base_error, base_cost = known[0]
    fixed = min(input_cost or 0.0, base_cost)  # noise of the figure may put the input alone above both together
    return [
        Sensitivity(
            layer,
            spec,
            weights,
            bits,
            cost if cost is not None else fixed + (base_cost - fixed) * error / max(base_error, np.finfo(float).tiny),
            error,
            measured=cost is not None,
            input_cost=input_cost,
        )
        for spec, bits, error, cost in rows
    ]


def stored_bits(spec: TensorSpec, shape: tuple[int, int]) -> int:
    """Bits on disk of a matrix (outputs, inputs): codes in their container, padded to whole bytes, and scales."""
    rows, columns = spec.granularity.scale_shape(*shape)
    return -(-shape[0] * shape[1] * spec.format.container_bits // 8) * 8 + rows * columns * SCALE_BITS


def smallest_bits(shapes: Iterable[tuple[int, int]], candidates: Sequence[TensorSpec] = CANDIDATES) -> int:
    """Bits on disk of matrices of these shapes (outputs, inputs), each in the smallest candidate that fits it."""
    return sum(min(stored_bits(spec, shape) for spec in candidates if _fits(spec, shape)) for shape in shapes)


def largest_bits(shapes: Iterable[tuple[int, int]], candidates: Sequence[TensorSpec] = CANDIDATES) -> int:
    """Bits on disk of matrices of these shapes (outputs, inputs), each in the largest candidate that fits it."""
    return sum(max(stored_bits(spec, shape) for spec in candidates if _fits(spec, shape)) for shape in shapes)


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return not isinstance(spec.granularity, PerGroup) or shape[1] % spec.granularity.size == 0
