"""By which extractor FD is measured: the one that was given, else the model's own, else none and a skipped rung."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from qexport.verify import VerifyReport
from qexport.verify.reference import Models
from qexport.verify.rungs import Climb, check_frechet

COUNT = 64
IMAGES_B3HW = np.random.default_rng(0).random((COUNT, 3, 4, 4), dtype=np.float32)


class Colours:
    """The mean of each colour as features; "real images" are the generated ones, moved by `apart` in feature space."""

    def __init__(self, name: str, apart: tuple[float, float, float]) -> None:
        found_BC = IMAGES_B3HW.mean(axis=(2, 3), dtype=np.float64)
        self.name, self.mu, self.cov = name, found_BC.mean(axis=0) + apart, np.cov(found_BC, rowvar=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


GIVEN, OWN = Colours("given", (3.0, 4.0, 0.0)), Colours("own", (0.0, 0.0, 2.0))


class Runtime:
    """Plays fixed images, and remembers how many were asked for."""

    def __init__(self) -> None:
        self.asked, self.player = 0, SimpleNamespace(calls=1)

    def batches(self, labels: np.ndarray, **settings: object) -> Iterator[np.ndarray]:
        self.asked = len(labels)
        yield from np.split(IMAGES_B3HW, 2)


def climbed(models: Models | None, given: Colours | None, max_fd: float | None = None) -> tuple[VerifyReport, Runtime]:
    report, runtime = VerifyReport("b"), Runtime()
    bundle = SimpleNamespace(manifest=SimpleNamespace(model=SimpleNamespace(num_classes=10)))
    one = Climb(cast(Any, bundle), "cpu", report, lambda *told: None, 16, 0, _runtimes={"serve": cast(Any, runtime)})
    check_frechet(one, models, given, COUNT, max_fd, None)
    return report, runtime


def models_with(features: Colours | None) -> Models:
    full = SimpleNamespace(features=features, entry=SimpleNamespace(name="some-model"))
    return cast(Models, SimpleNamespace(full=full))


@pytest.mark.parametrize(
    ("models", "given", "name", "distance"),
    [
        (models_with(OWN), GIVEN, "given", 25.0),  # ‖(3, 4, 0)‖², the covariances being equal
        (models_with(OWN), None, "own", 4.0),
        (models_with(None), GIVEN, "given", 25.0),
        (None, GIVEN, "given", 25.0),  # the checkpoint is not at hand, and not needed
    ],
)
def test_the_one_that_was_asked_for_else_the_models_own(models, given, name, distance):
    report, runtime = climbed(models, given, max_fd=10.0)
    assert report.quality["fd"]["name"] == name
    assert report.quality["fd"]["value"] == pytest.approx(distance, abs=1e-4)  # features are float32
    assert runtime.asked == COUNT
    assert [(check.name, check.passed) for check in report.checks] == [(f"FD ({name})", distance < 10)]
    assert not report.skipped


def test_without_either_the_rung_is_skipped_and_nothing_is_drawn():
    report, runtime = climbed(models_with(None), None)
    assert [(one.name, one.reason) for one in report.skipped] == [("FD", "some-model has no feature extractor")]
    assert "fd" not in report.quality
    assert runtime.asked == 0


def test_without_the_model_its_absence_is_listed_once():
    report, _ = climbed(None, None)
    assert not report.skipped  # `find_models` said it
    assert "fd" not in report.quality
