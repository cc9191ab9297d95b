"""Where a denoising graph is told its timestep."""

from __future__ import annotations

import numpy as np

from qexport.errors import InputError
from qexport.family import DenoiserModel


def timestep_place(model: DenoiserModel, noisy: np.ndarray, labels: np.ndarray) -> tuple[str, int]:
    """(port, flat index) where a denoising graph is told its timestep: what differs between the feeds of t = 0 and 1.

    Raises:
        InputError: nothing differs.
    """
    before, after = (model.graph_inputs(noisy, t, labels) for t in (0, 1))
    for port, array in before.items():
        changed = np.flatnonzero(np.asarray(array).reshape(-1) != np.asarray(after[port]).reshape(-1))
        if len(changed):
            return port, int(changed[0])
    raise InputError("the denoising graph is not told its timestep; no inputs can be made for it")
