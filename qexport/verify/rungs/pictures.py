"""The same seeds from the full-precision model and under ``serve``, beside those of the trajectories."""

from __future__ import annotations

import numpy as np

from qexport.reference.backend import torch_player
from qexport.verify.reference import Models
from qexport.verify.rungs.climb import PICTURES, Climb
from qexport.verify.trajectory import label_inputs, labels_for


def add_pictures(climb: Climb, models: Models | None, drawn: tuple[np.ndarray, np.ndarray] | None) -> None:
    """Add pictures where the trajectories left some.

    Args:
        climb: the climb.
        models: to draw with.
        drawn: images of both (b, 3, H, W) that another rung generated; None generates them.
    """
    runtime = climb.runtime("serve")
    if models is None or runtime is None or not climb.report.pictures:
        return
    count = min(PICTURES, climb.effort.samples, climb.batch)
    if drawn is not None:
        full, serve = (images[:count] for images in drawn)
    else:
        inputs = label_inputs(climb.bundle.plan, labels_for(count, models.full.entry.num_classes))
        full = torch_player(models.full).play(inputs, seed=climb.seed)
        serve = climb.attempt("pictures", lambda: runtime.player.play(inputs, seed=climb.seed))
    climb.report.pictures = {"torch, full precision": full, **climb.report.pictures}
    if serve is not None:
        climb.report.pictures["ONNX Runtime, serve"] = serve
