"""What the bundle is compared with, and how thoroughly."""

from __future__ import annotations

from qexport.bundle.calibration import CALIBRATION
from qexport.errors import BundleError
from qexport.family import Effort, Generator
from qexport.verify.checks import Place, failed
from qexport.verify.reference import Models, load_models
from qexport.verify.rungs.climb import Climb


def find_models(
    climb: Climb, generator: Generator | None, checkpoint: str | None, vae_checkpoint: str | None
) -> Models | None:
    """The models to compare with, or None, and the rungs that need them listed as skipped."""
    climb.tell("reference", 0, 1)
    try:
        models = load_models(climb.bundle, generator, checkpoint, vae_checkpoint)
    except BundleError as error:
        climb.report.checks.append(failed("calibration", Place(node=CALIBRATION), str(error)))
        return None
    if isinstance(models, str):
        climb.skip("weights, trajectories, quality", models)
        return None
    return models


def choose_effort(climb: Climb, models: Models | None, samples: int | None, schedule: str | None) -> None:
    """What was asked for, else what the model says of itself."""
    known = models.full.effort if models else Effort()
    plan = climb.bundle.plan
    default = known.schedule if known.schedule in plan.schedules else None
    climb.effort = Effort(samples or known.samples, schedule or default)
    played = climb.effort.schedule or plan.schedule
    climb.report.settings |= {"samples": climb.effort.samples, **({"schedule": played} if played else {})}
