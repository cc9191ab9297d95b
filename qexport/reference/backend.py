"""Torch as the backend of a player: the sampling plan that drives ONNX Runtime drives the torch modules too.

So both sides of a comparison get their noise, constants and state from the very same code, and what differs between
them is the graphs alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qexport.errors import BundleError
from qexport.family import Generator, Port
from qexport.reference.device import device_of, send
from qexport.runtime import Player


class TorchBackend:
    """Runs the torch modules of a generator in float32, where they lie (`qexport.runtime.Backend`)."""

    def __init__(self, generator: Generator) -> None:
        """Take the generator; its modules are used as they are, so weights written into them later count."""
        self._graphs = {spec.name: spec for spec in generator.graphs}
        self._inputs = {spec.name: {port.name: port for port in spec.inputs} for spec in generator.graphs}
        self._device = device_of(generator)

    def inputs(self, graph: str) -> Mapping[str, Port]:
        """Type of each input of a graph.

        Raises:
            BundleError: the model has no such graph.
        """
        if graph not in self._inputs:
            raise BundleError(f"the plan calls graph {graph!r}, which the model lacks; the bundle is of another model")
        return self._inputs[graph]

    def outputs(self, graph: str) -> tuple[str, ...]:
        """Names of the outputs of a graph."""
        return tuple(port.name for port in self._graphs[graph].outputs)

    def put(self, array: np.ndarray) -> Tensor:
        """A tensor with a copy of the array (tables are read-only maps, which torch cannot share)."""
        return send(torch.from_numpy(np.array(array, order="C")), self._device)

    def get(self, value: Tensor) -> np.ndarray:
        """The tensor as an array, in the same memory where that is the CPU's."""
        return value.detach().cpu().numpy()

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor of zeros."""
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)

    @torch.no_grad()
    def run(self, graph: str, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Call one module; `outputs` says which of its results to return."""
        spec = self._graphs[graph]
        results = spec.module(*(feeds[port.name] for port in spec.inputs))
        named = dict(zip((port.name for port in spec.outputs), results, strict=True))
        return {name: named[name] for name in outputs}


def torch_player(generator: Generator) -> Player[Tensor]:
    """A player of the generator's own plan on its torch modules."""
    return Player(generator.plan, TorchBackend(generator), generator.tables)
