"""Floating-point parameters that were trained: read from the bundle, held to the checkpoint.

Biases, embeddings, norms and the head are stored as the checkpoint has them, and any difference fails, unless the
manifest lists a parameter as trained (`Manifest.training`, ``floats``). The reference then takes it from the bundle, as
it does trained codes, and the same two things are asked of it (`qexport.verify.solved_codes`): the signal-to-noise
ratio against the (folded) parameter of the checkpoint is the manifest's, and both correlate far beyond chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qexport.bundle import Manifest
from qexport.errors import BundleError
from qexport.quantize import MATRIX_DIMENSIONS, StoredWeight
from qexport.verify.checks import NOWHERE, Check, Place, at_most
from qexport.verify.onnx_file import OnnxFile
from qexport.verify.solved_codes import SQNR_TOLERANCE_DB, correlation, least_correlation

NAME = "trained parameters that do not fit the checkpoint"


@dataclass(frozen=True)
class TrainedFloat:
    """What was found for one parameter: ratio in dB, correlation with the checkpoint's, and what is asked of that."""

    place: Place
    sqnr_db: float
    correlation: float
    least: float


def listed_floats(manifest: Manifest) -> dict[str, float]:
    """The ratio in dB that the manifest states for each parameter that was trained in floating point."""
    rows = () if manifest.training is None else manifest.training.get("floats", ())
    return {row["name"]: row["sqnr_db"] for row in rows}


def read_float(file: OnnxFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter of a graph as it is stored, in torch's `shape`: float16 (matrices) or float32.

    Raises:
        BundleError: the graph has none of that name, or one of another type or shape.
    """
    where = f"graph {file.graph!r}: parameter {name!r}"
    if name not in file.initializers:
        raise BundleError(f"{where} is listed as trained and is not there; quantise again")
    found = file.read(name)
    if any(node.op_type == "MatMul" and index == 1 for node, index in file.users(name)):
        found = found.T
    dtype = np.dtype(np.float16 if len(shape) >= MATRIX_DIMENSIONS else np.float32)
    if found.dtype != dtype or found.shape != shape:
        raise BundleError(f"{where} is {found.dtype} {found.shape}, not {dtype} {shape}; quantise again")
    return np.array(found)  # bytes of a file are read-only, and torch warns of such


def judge_float(weight: StoredWeight) -> TrainedFloat:
    """What to hold against the limits."""
    ratio = weight.sqnr_db
    assert ratio is not None
    likeness = correlation(weight.restored(), weight.original)
    return TrainedFloat(Place(weight.graph, weight.name), ratio, likeness, least_correlation(weight.original.size))


def check_floats(found: Sequence[TrainedFloat], manifest: Manifest) -> Check | None:
    """Whether they fit the checkpoint; the figure counts those that do not. None if nothing was trained so."""
    stated, problems = listed_floats(manifest), []
    for one in found:
        claimed = stated[one.place.node]
        if not abs(one.sqnr_db - claimed) <= SQNR_TOLERANCE_DB:
            detail = f"{one.sqnr_db:.3f} dB against the checkpoint, the manifest says {claimed}"
            problems.append((one.place, detail))
        elif not one.correlation >= one.least:
            detail = f"correlation {one.correlation:.3f} with the checkpoint, at least {one.least:.3f} expected"
            problems.append((one.place, detail))
    if not found:
        return None
    place, detail = problems[0] if problems else (NOWHERE, f"{len(found)} were trained, they are the bundle's")
    return at_most(NAME, len(problems), 0, place, detail, "parameters")
