"""What tests of damaged bundles share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from qexport.bundle import Bundle
from qexport.family import Effort, Generator
from qexport.verify import Check, VerifyReport, verify
from qexport.verify.rungs import Climb, check_weights, find_models
from qexport.verify.rungs.trajectories import check_each_operator

Sign = Callable[..., None]
PlaceOf = Callable[[Path, str], tuple[int, int]]
"""(bundle, tensor) → where its bytes begin in ``weights.data`` and how many they are."""
LAYER, TWIN = "blocks.1.ffn.fc2", "blocks.0.ffn.fc2"
"""Two layers of one shape."""


def failure(report: VerifyReport, name: str) -> Check:
    """The check of that name, which must have failed."""
    assert not report.passed
    found = [check for check in report.checks if check.name == name]
    assert found, [check.name for check in report.failures]
    assert not found[0].passed
    return found[0]


def climb(root: Path, generator: Generator, *, operators: bool = False) -> VerifyReport:
    """The rungs "weights" and, where asked for, "operators" alone: for damage that they must find by themselves."""
    report = VerifyReport(str(root))
    one = Climb(Bundle.open(root), "cpu", report, lambda stage, done, total: None, batch=2, seed=0, effort=Effort(2))
    models = find_models(one, generator, None, None)
    check_weights(one, models)
    if operators and models is not None:
        check_each_operator(one, models)
    return report


def check(root: Path, generator: Generator) -> VerifyReport:
    """The whole ladder, as short as it gets."""
    return verify(root, generator=generator, provider="cpu", samples=1, batch=1, speed=False, reports=False)


def change(root: Path, place: tuple[int, int], to: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other bytes (uint8) at a place of ``weights.data``."""
    data = np.fromfile(root / "weights.data", np.uint8)
    part = slice(place[0], place[0] + place[1])
    data[part] = to(data[part])
    data.tofile(root / "weights.data")


def swapped_nibbles(part: np.ndarray) -> np.ndarray:
    """Packed int4 codes (uint8), each pair the other way round."""
    return (part >> 4) | (part << 4)


def one_scale_doubled(part: np.ndarray) -> np.ndarray:
    """Scales in float16 (as uint8), the eighth twice as large."""
    scales = part.view("<f2").copy()
    scales[7] *= 2
    return scales.view(np.uint8)


DAMAGES = {f"{LAYER}.weight": swapped_nibbles, f"{LAYER}.weight_scale": one_scale_doubled}
"""Tensor → what is done to it; the check of that layer's codes must name the layer for each."""
