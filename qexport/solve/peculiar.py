"""What is peculiar about layers, their inputs and the calls they are calibrated on, as remarks.

Shape suffixes: O outputs, I inputs of a layer as a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from qexport.family import Generator
from qexport.numerics.statistics import InputStatistics
from qexport.recipe import Rule
from qexport.remarks import Remark


def on_solved(layer: str, statistics: InputStatistics) -> Iterator[Remark]:
    """A layer whose codes are solved for its inputs: channels about which those say nothing."""
    yield from _counted("gptq_zero_channels", layer, statistics.absmax_I == 0)


def on_smoothed(fold: str, weights: Iterable[npt.NDArray[np.float32]], statistics: InputStatistics) -> Iterator[Remark]:
    """An input that is smoothed: channels that are zero, and others that all `weights` (O, I) multiply by zero."""
    zero_I = statistics.absmax_I == 0
    unread_I = ~np.any([w_OI.any(axis=0) for w_OI in weights], axis=0)
    yield from _counted("smooth_zero_channels", fold, zero_I)
    yield from _counted("smooth_zero_weights", fold, unread_I & ~zero_I)


def on_constant(layer: str, constant_I: npt.NDArray[np.bool_]) -> Iterator[Remark]:
    """A layer with channels that never change."""
    yield from _counted("constant_channels", layer, constant_I)


def on_unsmoothed(generator: Generator, rules: Mapping[str, Rule]) -> Iterator[Remark]:
    """Layers that are to be smoothed, but read no input that a fold makes."""
    foldable = {layer for fold in generator.folds for layer in fold.layers}
    yield from (Remark("not_smoothed", layer) for layer, rule in rules.items() if rule.smooth and layer not in foldable)


def on_left_out(left_out: Mapping[str, tuple[int, int]]) -> Iterator[Remark]:
    """Graphs of which not every call was kept, as the recording counts them."""
    yield from (Remark("calls_left_out", graph, left, made) for graph, (left, made) in left_out.items())


def _counted(kind: str, place: str, found_I: npt.NDArray[np.bool_]) -> Iterator[Remark]:
    if found_I.any():
        yield Remark(kind, place, int(found_I.sum()), found_I.size)
