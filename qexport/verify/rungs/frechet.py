"""FD of generated images, under ``serve``."""

from __future__ import annotations

from qexport.family import FeatureExtractor
from qexport.verify.checks import NOWHERE, at_most
from qexport.verify.fd import measure_fd
from qexport.verify.reference import Models
from qexport.verify.rungs.climb import Climb
from qexport.verify.trajectory import labels_for


def check_frechet(
    climb: Climb,
    models: Models | None,
    given: FeatureExtractor | None,
    count: int,
    max_fd: float | None,
    schedule: str | None,
) -> None:
    """FD of `count` generated images, by the plan's schedule unless another was asked for.

    An extractor that was given needs no model beside the bundle: it has the statistics of real images with it.
    """
    runtime = climb.runtime("serve")
    extractor = _extractor(climb, models, given) if runtime else None
    if runtime is None or extractor is None:
        return
    calls = (runtime.player.with_schedule(schedule) if schedule else runtime.player).calls
    batches = runtime.batches(
        labels_for(count, climb.bundle.manifest.model.num_classes),
        seed=climb.seed,
        batch=climb.batch,
        schedule=schedule,
        progress=lambda done, total: climb.tell("FD", done // calls, total // calls),
    )
    found = climb.attempt("FD", lambda: measure_fd(batches, extractor, climb.seed))
    if found is None:
        return
    climb.report.quality["fd"] = found.to_json()
    if max_fd is not None:
        detail = f"{count} images, seed {climb.seed}, 95 % interval {found.low:.3g} … {found.high:.3g}, under serve"
        climb.report.checks.append(at_most(found.label, found.value, max_fd, NOWHERE, detail))


def _extractor(climb: Climb, models: Models | None, given: FeatureExtractor | None) -> FeatureExtractor | None:
    """What FD is measured by: the extractor that was asked for, else the model's own.

    None where there is neither, and the rung listed as skipped (without the model it is already).
    """
    if given is not None or models is None:
        return given
    if models.full.features is None:
        climb.skip("FD", f"{models.full.entry.name} has no feature extractor")
    return models.full.features
