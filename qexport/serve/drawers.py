"""What draws batches: a runtime in this process (`LocalDrawer`), a process of its own, or a replica on another machine.

An engine has one thread for each of its drawers. A drawer that is gone (`LostError`) loses no request: noise belongs to
an image, so a batch that is drawn again gives the same images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qexport.errors import InputError
from qexport.runtime import Player, Runtime
from qexport.serve.failures import BrokenError
from qexport.serve.logs import event


class LostError(Exception):
    """The drawer ended, or hung, before it answered; `start` it again before the next batch.

    `begun`: whether it may have begun the batch, which then may be what ended it.
    """

    def __init__(self, text: str, begun: bool = True) -> None:
        """Say what happened."""
        super().__init__(text)
        self.begun = begun


@dataclass(frozen=True)
class Batch:
    """Inputs of the plan by name, its schedule (None: the bundle's default), and (seed, number) of each image."""

    inputs: Mapping[str, np.ndarray]
    images: Sequence[tuple[int, int]]
    schedule: str | None = None


class Drawer(Protocol):
    """Draws one batch at a time."""

    def start(self) -> None:
        """Make it ready to draw, after `LostError` too; may take long.

        Raises:
            InputError: it cannot be, as things are.
            LostError: it ended on the way.
        """
        ...

    def draw(self, batch: Batch, limit_s: float | None = None) -> np.ndarray:
        """Images (n, 3, H, W) of a batch.

        Raises:
            BrokenError: the graphs failed; the text says how.
            LostError: there is no drawer any more, or it took longer than `limit_s` where that can be known.
        """
        ...

    def kill(self) -> None:
        """End it at once, from any thread; a `draw` that runs in another one raises `LostError` where that can be."""
        ...

    def stop(self) -> None:
        """Give back what it holds; may be called twice."""
        ...


class LocalDrawer:
    """A runtime in this process. What kills it kills the process, so it is never lost."""

    def __init__(self, runtime: Runtime) -> None:
        """Take a loaded runtime."""
        self._players: dict[str | None, Player[Any]] = {
            None: runtime.player,
            runtime.bundle.plan.schedule: runtime.player,
        }

    def start(self) -> None:
        """Nothing to do: the runtime is loaded."""

    def draw(self, batch: Batch, limit_s: float | None = None) -> np.ndarray:
        """As `Drawer.draw`; a kernel cannot be interrupted, so `limit_s` says nothing here."""
        del limit_s
        try:
            return self._play(batch)
        except InputError as error:  # its subclasses too: what the graphs say of inputs that passed the plan's limits
            event("batch failed", logging.ERROR, error, images=len(batch.images))
            raise BrokenError(str(error)) from error
        except Exception as error:
            event("batch failed", logging.ERROR, error, images=len(batch.images))
            raise BrokenError(f"drawing failed ({type(error).__name__})") from error

    def kill(self) -> None:
        """Nothing that could be done."""

    def stop(self) -> None:
        """Nothing to do."""

    def _play(self, batch: Batch) -> np.ndarray:
        if batch.schedule not in self._players:
            assert batch.schedule is not None
            self._players[batch.schedule] = self._players[None].with_schedule(batch.schedule)
        return self._players[batch.schedule].play(batch.inputs, images=batch.images)
