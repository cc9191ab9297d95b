"""One layer alone: a full-precision model in which a single layer's weight, its input, or both are rounded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from qexport.family import Generator
from qexport.formats import get_format
from qexport.recipe import Calibration, Recipe, Rule
from qexport.reference import Interception, Window, fake_quantise
from qexport.reference.twin import with_activations
from qexport.scheme import ActivationSpec, PerChannel, PerStep, TensorSpec
from qexport.solution import Activation
from qexport.solve import solve

T = TypeVar("T")

CALIBRATED_WITH = TensorSpec(get_format("int8"), PerChannel())
"""Weights while the inputs of layers are observed: the format that moves them least."""


def input_activations(
    generator: Generator, layers: Sequence[str], spec: ActivationSpec, calibration: Calibration
) -> Mapping[str, Activation]:
    """How the input of each layer is to be quantised, calibrated once for all of them; `generator` is not changed.

    Nothing is smoothed: what smoothing would take off the inputs is not in these scales.

    Raises:
        InputError: see `qexport.solve.solve`.
    """
    rules = tuple(Rule(layer, CALIBRATED_WITH, activation=spec) for layer in layers)
    return solve(copy.deepcopy(generator), Recipe("inputs", rules, calibration=calibration)).activations


@contextmanager
def rounded_weight(parameter: Tensor, restored_OI: np.ndarray) -> Iterator[None]:
    """While it is entered, the parameter holds these numbers."""
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(restored_OI))
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(original)


def with_input(
    generator: Generator, layer: str, activation: Activation | None, judge: Callable[[Generator, bool], T]
) -> T:
    """What `judge` says of the model when this layer's input is rounded; None rounds nothing.

    Scales that change from step to step come out of the sampling plan, which a judge plays call by call; others are
    the same in one pass over a whole sequence, which takes a third of the time.

    Raises:
        InputError: the layer is never reached.
    """
    if activation is None:
        return judge(generator, False)
    if isinstance(activation.spec.scales, PerStep):
        return judge(with_activations(generator, {layer: activation}), True)
    graph, name = generator.layers[layer]

    def visit(_: str, x: Tensor, window: Window | None) -> Tensor:
        return fake_quantise(x, activation)

    with Interception({layer: generator.graph(graph).parameters()[name]}, visit) as mode:
        said = judge(generator, False)
    mode.require_seen([layer])
    return said
