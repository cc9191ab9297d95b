"""The rungs of the ladder, a file each. Each adds its checks and figures to the report; none stops the others.

A rung is a function of a `Climb`, the bundle under way with what all rungs share. A bundle that turns out not to be
what it should be (`BundleError`) is a failed check of the rung that noticed.

    files         integrity, structure, weights
    models        what to compare with, and how thoroughly
    trajectories  every call of played trajectories, and the quantised operators one by one
    placement     what ran where, and what was fused
    quality       how far from the full-precision model
    frechet       FD of generated images
    speed         latency and peak memory
    pictures      images of all sides, for the HTML report
    decision      why it is quantised so, for the HTML report
"""

from __future__ import annotations

from qexport.verify.rungs.climb import Climb
from qexport.verify.rungs.decision import add_decision
from qexport.verify.rungs.files import check_weights, describe_bundle
from qexport.verify.rungs.frechet import check_frechet
from qexport.verify.rungs.models import choose_effort, find_models
from qexport.verify.rungs.pictures import add_pictures
from qexport.verify.rungs.placement import check_placement
from qexport.verify.rungs.quality import check_quality
from qexport.verify.rungs.speed import add_speed
from qexport.verify.rungs.trajectories import check_trajectories

__all__ = [
    "Climb",
    "add_decision",
    "add_pictures",
    "add_speed",
    "check_frechet",
    "check_placement",
    "check_quality",
    "check_trajectories",
    "check_weights",
    "choose_effort",
    "describe_bundle",
    "find_models",
]
