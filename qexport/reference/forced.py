"""Teacher forcing through the plan itself: any backend draws the tokens it is told to draw.

A bundle has no port that takes tokens, and needs none: the uniform numbers decide what is drawn. So each drawing call
is made twice. The first gives the guided logits. From these, in float64, follow the numbers that draw the wanted
tokens; the second call gets them and returns everything. The filters are off, and the temperature of both is so high
that every token has a comparable share of the mass: the middle of a share of about 1/V is far (1e-4 for V = 4096) from
where rounding could matter (1e-6). What comes out is checked all the same.

Logits are those before temperature and filters, so none of this changes them. The price is a second run of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from qexport.errors import BundleError
from qexport.family import DrawSpec
from qexport.reference.wrapped import WrappedBackend
from qexport.runtime import Backend, Player
from qexport.runtime.inputs import label_input

FLATTENING_TEMPERATURE = 100.0
"""Logits of ± 50 then give shares within a factor e of 1/V."""

UNGUIDED = {"cfg": 0.0}
"""The plan's input for guidance, by convention called so, at the value that turns it off."""

V = TypeVar("V")


class ForcedBackend(WrappedBackend[V]):
    """A backend whose draws are decided by `tokens_BL`, consumed from left to right."""

    def __init__(self, backend: Backend[V], draw: DrawSpec, tokens_BL: np.ndarray) -> None:
        """Wrap `backend` for one batch of tokens (B, L), all that one play draws."""
        super().__init__(backend)
        self._draw, self._tokens = draw, tokens_BL
        self._next = 0

    def run(self, graph: str, feeds: Mapping[str, V], outputs: tuple[str, ...]) -> Mapping[str, V]:
        """Run a graph; a drawing one draws the next tokens.

        Raises:
            BundleError: the graph drew something else; its sampler does not do what `DrawSpec` says.
        """
        draw = self._draw
        if graph != draw.graph:
            return self._backend.run(graph, feeds, outputs)
        settings = {draw.temperature: FLATTENING_TEMPERATURE, draw.top_k: 0, draw.top_p: 0}
        types = self._backend.inputs(graph)
        feeds = dict(feeds) | {
            port: self._backend.put(np.asarray(value, types[port].dtype)) for port, value in settings.items()
        }
        logits = self._backend.get(self._backend.run(graph, feeds, (draw.logits,))[draw.logits])
        length = logits.shape[1]
        tokens_BL = self._tokens[:, self._next : self._next + length]
        self._next += length
        feeds[draw.uniform] = self._backend.put(_uniform_for(logits, tokens_BL))
        results = self._backend.run(graph, feeds, tuple(dict.fromkeys((*outputs, draw.tokens))))
        if not np.array_equal(self._backend.get(results[draw.tokens]), tokens_BL):
            raise BundleError(f"graph {graph!r} does not draw by inverse CDF in vocabulary order from {draw.uniform!r}")
        return results


def forced_logits(
    player: Player[V], draw: DrawSpec, labels: np.ndarray, tokens_BL: np.ndarray, tables: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Unguided logits (B, l, V) of every drawing call in turn, under teacher forcing with `tokens_BL` (B, L)."""
    plan = player.plan
    drawing_only = replace(plan, calls=tuple(call for call in plan.calls if call.graph == draw.graph))
    port = label_input(plan)
    known = {spec.name for spec in plan.inputs}
    inputs: dict[str, Any] = {name: value for name, value in UNGUIDED.items() if name in known}
    if port is not None:
        inputs[port.name] = labels
    found: list[np.ndarray] = []
    forced = Player(drawing_only, ForcedBackend(player.backend, draw, tokens_BL), tables)
    forced.play(
        inputs,
        observer=lambda record: found.append(player.backend.get(record.results[draw.logits])),
        extra_outputs={draw.graph: (draw.logits,)},
    )
    return found


def _uniform_for(logits_BLV: np.ndarray, tokens_BL: np.ndarray) -> np.ndarray:
    """The number in the middle of each token's share of the mass at `FLATTENING_TEMPERATURE`, float32."""
    uniform = np.empty(tokens_BL.shape, np.float32)
    for image, (rows_LV, tokens_L) in enumerate(zip(logits_BLV, tokens_BL, strict=True)):
        mass_LV = np.exp(rows_LV.astype(np.float64) / FLATTENING_TEMPERATURE)
        running_LV = np.cumsum(mass_LV, axis=-1)
        position = np.arange(len(tokens_L))
        middle_L = running_LV[position, tokens_L] - mass_LV[position, tokens_L] / 2
        uniform[image] = middle_L / running_LV[:, -1]
    return uniform
