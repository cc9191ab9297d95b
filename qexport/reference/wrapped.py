"""A backend around another: all is handed on, but for what a subclass does in `run`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

import numpy as np

from qexport.runtime import Backend
from qexport.runtime.player import PortLike

V = TypeVar("V")


class WrappedBackend(Generic[V]):
    """A `Backend` that hands everything to `backend`."""

    def __init__(self, backend: Backend[V]) -> None:
        """Wrap `backend`."""
        self._backend = backend

    def inputs(self, graph: str) -> Mapping[str, PortLike]:
        """See `Backend`."""
        return self._backend.inputs(graph)

    def outputs(self, graph: str) -> Collection[str]:
        """See `Backend`."""
        return self._backend.outputs(graph)

    def put(self, array: np.ndarray) -> V:
        """See `Backend`."""
        return self._backend.put(array)

    def get(self, value: V) -> np.ndarray:
        """See `Backend`."""
        return self._backend.get(value)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> V:
        """See `Backend`."""
        return self._backend.zeros(shape, dtype)

    def run(self, graph: str, feeds: Mapping[str, V], outputs: tuple[str, ...]) -> Mapping[str, V]:
        """See `Backend`."""
        return self._backend.run(graph, feeds, outputs)
