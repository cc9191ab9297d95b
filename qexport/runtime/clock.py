"""Playing a batch with a clock: how long each graph took, and the whole."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from qexport.runtime.inputs import label_input
from qexport.runtime.player import Player

TOTAL = "total"
"""The whole batch, beside the names of graphs."""


class _Enough(Exception):  # noqa: N818 - it is no error
    pass


def some_labels(player: Player[Any], size: int, num_classes: int) -> dict[str, np.ndarray]:
    """Classes for a batch of `size`, all in turn, as the plan's input; nothing if it takes none."""
    port = label_input(player.plan)
    return {port.name: np.arange(size) % num_classes} if port else {}


def play_once(player: Player[Any], inputs: Mapping[str, Any], size: int, calls: int | None = None) -> dict[str, float]:
    """Play one batch, or its first `calls` calls of graphs; seconds of each graph in all, and `TOTAL`."""
    seconds: dict[str, float] = defaultdict(float)
    start = last = time.perf_counter()
    done = 0

    def clock(graph: str) -> None:
        nonlocal last, done
        now = time.perf_counter()
        seconds[graph] += now - last
        last = now
        done += 1
        if done == calls:
            raise _Enough

    with contextlib.suppress(_Enough):
        player.play(inputs, batch=size, called=clock)  # an observer would turn caches in place off
    return {TOTAL: time.perf_counter() - start, **seconds}
