"""Codes that cannot be computed anew, because inputs made them: read from the bundle, held to the checkpoint.

For every other layer the reference's codes come from the checkpoint and the recipe, and a bundle does not get to say
what is right. GPTQ's depend on inputs that were gathered on another machine, so the reference takes them from the
bundle, and two things are asked of them instead:

- The signal-to-noise ratio of the weight that they stand for, against the (folded) weight of the checkpoint, is that of
  the manifest's layer table to `SQNR_TOLERANCE_DB`. A scale of one group of 32 in a 128 × 512 matrix, doubled, moves it
  by 0.03 dB.
- It is not lower than rounding to nearest reaches with the same specification, less `MAX_SQNR_LOSS_DB`, nor below 0 dB,
  where a matrix of zeros would be nearer. So a manifest that was changed along with the codes does not help much.

GPTQ trades weight error for output error. With G the mean of x xᵀ, its least eigenvalue λ (damping makes it at least a
hundredth of the mean eigenvalue g), and E the weight's error: λ‖E‖² ≤ tr(E G Eᵀ) ≤ tr(E₀ G E₀ᵀ) ≈ g‖E₀‖², where E₀ is
the error of rounding to nearest, which is as good as white. So ‖E‖² ≤ (g/λ)‖E₀‖² ≤ 100‖E₀‖²: 20 dB.

Codes that were trained (`Manifest.training`) cannot be computed anew either, whatever algorithm they started from, and
training may move a weight as far as it likes: nothing bounds its error. The first thing is asked of them as well, and
instead of the second that they are codes of this weight at all: the correlation with the checkpoint's is at least
`LEAST_CORRELATION_SIGMAS` times 1/√n, the standard deviation of that of two unrelated weights of n numbers. The
least of any layer of var-c10-d2 at 2 bits after twenty steps is 0.87, from rounding to nearest 0.81; asked is 0.08.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.algorithms import NEEDS_INPUTS, get_algorithm
from qexport.bundle import Manifest
from qexport.errors import BundleError, InputError
from qexport.numerics.metrics import sqnr_db
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import StoredWeight
from qexport.recipe import Rule
from qexport.scheme import PerGroup, TensorSpec
from qexport.verify.checks import NOWHERE, Check, Place, at_most
from qexport.verify.onnx_file import OnnxFile

NAME = "solved codes that do not fit the checkpoint"

SQNR_TOLERANCE_DB = 0.001
"""The table has three decimals (0.0005), and float64 sums over a weight agree far better."""

MAX_SQNR_LOSS_DB = 20.0
"""See module."""

WORTHLESS_SQNR_DB = 0.0
"""Of a matrix of zeros."""

LEAST_CORRELATION_SIGMAS = 10.0
"""Chance reaches it once in 10²³ matrices."""

MOST_NEEDED_CORRELATION = 0.5
"""Of a matrix so small that ten standard deviations are more than any two weights can have."""


@dataclass(frozen=True)
class SolvedCodes:
    """What was found for one layer: its ratio, that of rounding to nearest, both in dB.

    Of codes that were trained, `correlation` is that with the checkpoint's weight, and `least` what is asked of it.
    """

    place: Place
    sqnr_db: float
    rtn_sqnr_db: float
    correlation: float | None = None
    least: float = 0.0


def trained_graph(manifest: Manifest) -> str | None:
    """The graph whose codes were trained, if any was."""
    return None if manifest.training is None else str(manifest.training["graph"])


def must_be_read(rule: Rule, trained: bool) -> bool:
    """Whether a layer's codes depend on inputs, or were trained, so that they can only be read."""
    return rule.weight is not None and (trained or rule.algorithm in NEEDS_INPUTS)


def read_codes(file: OnnxFile, weight: str, spec: TensorSpec, shape: tuple[int, ...]) -> QuantizedTensor:
    """The codes of a layer in a graph, as (outputs, inputs); `shape` is that of the weight in torch.

    Raises:
        BundleError: the graph has no such codes, or they do not fit the specification.
    """
    where = f"graph {file.graph!r}: weight {weight!r}"
    if weight not in file.initializers or f"{weight}_scale" not in file.initializers:
        raise BundleError(f"{where} has no codes and scales; quantise again")
    codes, scales = file.codes(weight), file.read(f"{weight}_scale")
    outputs = shape[0]
    matrix = codes.T if len(shape) == 2 else codes.reshape(outputs, -1)
    rows = scales.T if isinstance(spec.granularity, PerGroup) else scales.reshape(-1, 1)
    try:
        found = QuantizedTensor(np.ascontiguousarray(matrix), np.ascontiguousarray(rows), spec)
    except InputError as error:
        raise BundleError(f"{where}: {error}") from error
    if found.codes.shape != (outputs, int(np.prod(shape[1:]))):
        raise BundleError(f"{where} has codes {codes.shape}, which do not fit a weight {shape}; quantise again")
    return found


def judge(weight: StoredWeight, trained: bool) -> SolvedCodes | None:
    """What to hold against the limits; None for a layer whose codes were computed anew."""
    rule = weight.rule
    if rule is None or rule.weight is None or not must_be_read(rule, trained):
        return None
    matrix = weight.original.reshape(len(weight.original), -1)
    plain = get_algorithm("rtn")(matrix, rule.weight, name=weight.name).dequantize()
    found = weight.sqnr_db
    assert found is not None
    place = Place(weight.graph, weight.layer or weight.name)
    if not trained:
        return SolvedCodes(place, found, sqnr_db(plain, matrix))
    likeness = correlation(weight.restored(), weight.original)
    return SolvedCodes(place, found, sqnr_db(plain, matrix), likeness, least_correlation(matrix.size))


def least_correlation(count: int) -> float:
    """What is asked of the correlation of trained numbers with the checkpoint's, `count` of them."""
    return min(LEAST_CORRELATION_SIGMAS / math.sqrt(count), MOST_NEEDED_CORRELATION)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """⟨a, b⟩ / ‖a‖‖b‖, in float64; 0 where one of them is 0."""
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0


def check_solved(found: Iterable[SolvedCodes], rows: Iterable[Mapping[str, Any]]) -> Check | None:
    """Whether the codes fit the checkpoint; the figure counts layers where they do not. None if nothing was solved."""
    stated = {str(row.get("name")): row.get("sqnr_db") for row in rows}
    found, problems = list(found), []
    for layer in found:
        floor = max(layer.rtn_sqnr_db - MAX_SQNR_LOSS_DB, WORTHLESS_SQNR_DB)
        claimed = stated.get(layer.place.node)
        if not isinstance(claimed, int | float) or not abs(layer.sqnr_db - claimed) <= SQNR_TOLERANCE_DB:
            problems.append(
                (layer.place, f"{layer.sqnr_db:.3f} dB against the checkpoint, the manifest says {claimed}")
            )
        elif layer.correlation is not None:
            if not layer.correlation >= layer.least:
                detail = f"correlation {layer.correlation:.3f} with the checkpoint, at least {layer.least:.3f} expected"
                problems.append((layer.place, detail))
        elif not layer.sqnr_db >= floor:
            problems.append(
                (layer.place, f"{layer.sqnr_db:.3f} dB against the checkpoint, at least {floor:.1f} expected")
            )
    if not found:
        return None
    place, detail = problems[0] if problems else (NOWHERE, _described(found))
    return at_most(NAME, len(problems), 0, place, detail, "layers")


def _described(found: Sequence[SolvedCodes]) -> str:
    trained = sum(layer.correlation is not None for layer in found)
    if not trained:
        return f"{len(found)} layers whose algorithm saw inputs"
    rest = f", {len(found) - trained} whose algorithm saw inputs" if trained < len(found) else ""
    return f"{trained} layers were trained, their codes are the bundle's{rest}"
