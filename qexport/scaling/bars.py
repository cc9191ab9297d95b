"""Bars of a plot of many runs: what the judged images leave undecided between them.

Runs are judged on the same images, and whether those are hard ones moves all alike and says nothing about which is
lower. So the mean over all points is taken out of every resample, times √(n/(n − 1)) for the n points that it is made
of (Cousineau 2005, "Confidence intervals in within-subject designs"; Morey 2008). Points that share nothing keep their
intervals.

Legend: S sizes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qexport.scaling.curves import Curve
from qexport.scaling.figures import interval


def level_bars(curves: Sequence[Curve]) -> dict[Curve, np.ndarray]:
    """How far the 95 % interval of every point reaches below and above it, (2, S), what is shared counted in."""
    return {curve: _reach(curve, curve.samples) for curve in curves}


def own_bars(curves: Sequence[Curve]) -> dict[Curve, np.ndarray]:
    """The same without what all points share. A point alone shares nothing."""
    samples = np.concatenate([curve.samples for curve in curves], axis=1)
    points = samples.shape[1]
    if points == 1:
        return level_bars(curves)
    shared_R1 = (samples - samples.mean(axis=0)).mean(axis=1, keepdims=True)
    factor = np.sqrt(points / (points - 1))
    found = {}
    for curve in curves:
        middle = curve.samples.mean(axis=0)
        found[curve] = _reach(curve, middle + factor * (curve.samples - middle - shared_R1))
    return found


def _reach(curve: Curve, samples_RS: np.ndarray) -> np.ndarray:
    low, high = np.array([interval(column) for column in samples_RS.T]).T
    return np.maximum(np.stack([curve.y - low, high - curve.y]), 0)
