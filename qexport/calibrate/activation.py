"""From the values that flowed into a layer to the scale they are quantised with.

The least squared error is searched over how much of the range is kept: a geometric grid, then a finer one around its
best. Symmetric scales map the kept magnitude to the format's greatest code; with a zero point the two ends are searched
in turn, and zero is always among the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from qexport.calibrate.histogram import Histogram
from qexport.errors import InputError
from qexport.formats import NumberFormat
from qexport.reference.fake_quant import round_to
from qexport.remarks import Remark
from qexport.scheme import ActivationSpec, PerStep, PerToken
from qexport.solution import Activation

F64 = npt.NDArray[np.float64]

PERCENTILE = 0.9999
"""Share of the values that the percentile observer keeps inside the range, as is usual for activations."""

ZERO_INPUT_SCALE = 1.0
"""Scale of an input that is always zero: any positive number keeps it so."""

_PER_OCTAVE = 8  # of the coarse grid; the finer one divides its steps by as many again
_COARSE = np.exp2(np.arange(-6 * _PER_OCTAVE, 1) / _PER_OCTAVE)
"""Kept shares of the range, from 1/64 to all: below that, even int4 would clip values that are its own step."""
_COARSE_FLOAT = np.exp2(np.arange(-6 * _PER_OCTAVE, _PER_OCTAVE + 1) / _PER_OCTAVE)
"""Floating-point codes lie closer where they are smaller: a range of up to twice the values' may round them better."""
_FINE = np.exp2(np.arange(-_PER_OCTAVE, _PER_OCTAVE + 1) / _PER_OCTAVE**2)
_ROUNDS = 2  # of the two ends in turn; a third changed no scale by more than the fine grid's step


def choose(histograms: Sequence[Histogram], spec: ActivationSpec, layer: str) -> Activation:
    """The activation of one layer; one histogram, or one per step, or none per token.

    Raises:
        InputError: a histogram without values: calibration never reached that layer, or not in that step.
    """
    if isinstance(spec.scales, PerToken):
        return Activation(spec, None)
    for step, histogram in enumerate(histograms):
        if not histogram.count:
            where = f" in step {step}; calibrate with a schedule that visits it" if len(histograms) > 1 else ""
            raise InputError(f"{layer}: was never reached in calibration{where}")
    if isinstance(spec.scales, PerStep):
        scales = [_symmetric(histogram, spec) for histogram in histograms]
        return Activation(spec, np.array(scales, dtype=np.float32))
    (histogram,) = histograms
    if spec.symmetric:
        return Activation(spec, np.array(_symmetric(histogram, spec), dtype=np.float32))
    scale, zero_point = _with_zero_point(histogram, spec)
    return Activation(spec, np.array(scale, dtype=np.float32), zero_point)


def remarks_on(histograms: Sequence[Histogram], layer: str) -> list[Remark]:
    """Inputs whose scale says little, since they were zero or one value all along; counted by scale (step)."""
    zero = sum(not histogram.absmax for histogram in histograms)
    constant = sum(histogram.least == histogram.greatest != 0 for histogram in histograms)
    found = {"zero_inputs": zero, "constant_inputs": constant}
    return [Remark(kind, layer, count, len(histograms)) for kind, count in found.items() if count]


def _symmetric(histogram: Histogram, spec: ActivationSpec) -> float:
    reach = histogram.absmax
    if not reach:
        return ZERO_INPUT_SCALE
    if spec.observer == "minmax":
        return reach / spec.format.greatest
    middles, counts = histogram.occupied()
    if spec.observer == "percentile":
        return min(reach, _quantile(np.abs(middles), counts)) / spec.format.greatest

    def errors(tops: F64) -> F64:
        return _squared_errors(middles, counts, tops / spec.format.greatest, np.zeros_like(tops), spec.format)

    return _search(reach, errors, _COARSE_FLOAT if spec.format.kind == "float" else _COARSE) / spec.format.greatest


def _with_zero_point(histogram: Histogram, spec: ActivationSpec) -> tuple[float, int]:
    least, greatest = min(histogram.least, 0.0), max(histogram.greatest, 0.0)
    if least == greatest:
        return ZERO_INPUT_SCALE, 0
    low, high = least, greatest
    middles, counts = histogram.occupied()
    if spec.observer == "percentile":
        low = max(least, min(0.0, -_quantile(-middles, counts)))
        high = min(greatest, max(0.0, _quantile(middles, counts)))
    elif spec.observer == "mse":

        def errors(lows: F64, highs: F64) -> F64:
            return _squared_errors(middles, counts, *_affine(lows, highs, spec.format), spec.format)

        for _ in range(_ROUNDS):
            if greatest > 0:
                high = _search(greatest, lambda tops, low=low: errors(np.full_like(tops, low), tops), _COARSE)
            if least < 0:
                low = -_search(-least, lambda tops, high=high: errors(-tops, np.full_like(tops, high)), _COARSE)
    scale, zero_point = _affine(np.array([low]), np.array([high]), spec.format)
    return float(scale[0]), int(zero_point[0])


def _affine(low: F64, high: F64, number_format: NumberFormat) -> tuple[F64, F64]:
    """Scales and zero points that map `low` to the least code and `high` to the greatest; low ≤ 0 ≤ high."""
    scale = ((high - low) / (number_format.code_max - number_format.code_min)).astype(np.float32).astype(np.float64)
    zero_point = np.clip(np.rint(number_format.code_min - low / scale), number_format.code_min, number_format.code_max)
    return scale, zero_point


def _search(reach: float, errors: Callable[[F64], F64], shares: F64) -> float:
    """The kept magnitude of least error: on the coarse grid, then on the fine one around it."""
    coarse = reach * shares
    fine = coarse[np.argmin(errors(coarse))] * _FINE
    return float(fine[np.argmin(errors(fine))])


def _squared_errors(
    middles: npt.NDArray[np.float32],
    counts: npt.NDArray[np.int64],
    scales: F64,
    zero_points: F64,
    number_format: NumberFormat,
) -> F64:
    """Σ counts · (middle − what its code stands for)², one for each candidate."""
    x = torch.from_numpy(middles)
    scale = torch.from_numpy(scales.astype(np.float32))[:, None]
    zero_point = torch.from_numpy(zero_points.astype(np.float32))[:, None]
    restored = (round_to(x / scale, number_format, zero_point) - zero_point) * scale
    return ((restored - x).double().square() @ torch.from_numpy(counts).double()).numpy()


def _quantile(values: npt.NDArray[np.float32], counts: npt.NDArray[np.int64]) -> float:
    """The least value that `PERCENTILE` of the weighted values do not exceed."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(cumulated, PERCENTILE * cumulated[-1])])
