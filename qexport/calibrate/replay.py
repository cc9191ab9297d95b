"""Running a graph stretch by stretch over recorded trajectories, so that a layer can be changed before what follows it.

A *stage* is one module of one part: an embedding, a block, a head. The replay keeps, for every recorded call, the wires
that later stages still need; caches of a stage start empty in every trajectory and are filled by the stage itself.

Wires lie on disk (`qexport.calibrate.shelf`), a file for each batch and only for the stage that comes next: memory
holds those of one batch. A run that was cut off goes on from the last stage whose wires are all there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qexport.calibrate.record import caches
from qexport.calibrate.shelf import RecordedCall, Shelf, Trajectory, is_stand_in
from qexport.family import Generator, GraphSpec
from qexport.reference import After, Interception, Window


@dataclass(frozen=True)
class Stage:
    """One module of a graph. `parameters` are the graph's names of its own; `inputs` and `outputs` those of wires."""

    graph: str
    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: frozenset[str]


Tap = Callable[[str, Tensor, Window | None, int | None], Tensor]
"""Called with layer, its input, the window of a convolution and the step; returns what the layer is given."""


def stages(spec: GraphSpec) -> list[Stage]:
    """The stages of a graph in order."""
    found = []
    for part in spec.all_parts:
        for i, module in enumerate(part.modules):
            prefix = part.prefix.format(i=i)
            found.append(
                Stage(
                    graph=spec.name,
                    name=prefix.rstrip(".") or type(module).__name__.lower(),
                    module=module,
                    inputs=tuple(port.name.format(i=i) for port in part.inputs),
                    outputs=tuple(port.name.format(i=i) for port in part.outputs),
                    parameters=frozenset(prefix + name for name, _ in module.named_parameters()),
                )
            )
    return found


class Replay:
    """The recorded calls of one graph, and how far they have come."""

    def __init__(
        self, generator: Generator, graph: str, trajectories: Sequence[Trajectory], folder: Path | None = None
    ) -> None:
        """Stand before the first stage of `graph`; trajectories are read a batch at a time, whenever they are needed.

        `folder` is for the wires, of this graph, these trajectories and one way to quantise alone; without one, a
        temporary folder lives as long as this.
        """
        spec = generator.graph(graph)
        self.stages = stages(spec)
        self._graph, self._trajectories = graph, trajectories
        self._caches = caches(generator.plan, spec)
        self._shelf = Shelf(folder)
        self._next = 0

    @property
    def stage(self) -> Stage:
        """The stage that comes next."""
        return self.stages[self._next]

    def skip_to(self, known: int) -> int:
        """Go to the last stage up to number `known` whose wires a run before left behind; its number.

        The stages before `known` are those that ended as they did in that run. What lies beyond is dropped.
        """
        for stage in range(known + 1, len(self.stages)):
            self._drop(stage)
        there = [stage for stage in range(1, known + 1) if all(map(self._shelf.holds, self._names(stage)))]
        self._next = max(there, default=0)
        return self._next

    def run(self, weights: dict[str, Tensor] | None = None, tap: Tap | None = None, after: After | None = None) -> None:
        """Run the stage on all calls and forget what it returns.

        `tap` sees the inputs of the layers in `weights`, `after` their outputs.
        """
        self._run(weights or {}, tap, after, keep=False)

    def advance(
        self, weights: dict[str, Tensor] | None = None, tap: Tap | None = None, after: After | None = None
    ) -> None:
        """Run the stage on all calls; what it returns is what the next one is given."""
        self._run(weights or {}, tap, after, keep=True)
        self._next += 1
        self._drop(self._next - 1)

    @torch.no_grad()
    def _run(self, weights: dict[str, Tensor], tap: Tap | None, after: After | None, *, keep: bool) -> None:
        stage, step = self.stage, None
        own = {port: self._caches[port] for port in stage.inputs if port in self._caches}
        needed = {port for later in self.stages[self._next + 1 :] for port in later.inputs}

        def visit(layer: str, x: Tensor, window: Window | None) -> Tensor:
            return x if tap is None else tap(layer, x, window, step)

        with Interception(weights, visit, after) as mode:
            for calls, name in zip(self._batches(), self._names(self._next + 1), strict=True):
                carried: dict[str, Tensor] = {}
                kept: list[RecordedCall] = []
                for call in calls:
                    step = call.step
                    given = [
                        carried[port] if port in carried else _in_memory(call.feeds[port]) for port in stage.inputs
                    ]
                    returned = stage.module(*given)
                    returned = (returned,) if isinstance(returned, Tensor) else returned  # a part with one output
                    results = dict(zip(stage.outputs, returned, strict=True))
                    carried = {port: results.pop(out) for port, out in own.items()}
                    if keep:
                        wires = {port: x for port, x in {**call.feeds, **results}.items() if port in needed}
                        kept.append(replace(call, feeds=wires))
                if keep:
                    self._shelf.put(name, kept)
        mode.require_seen(weights)

    def _batches(self) -> Iterator[Trajectory]:
        """The calls of each batch with the wires that the stage is given."""
        if self._next:
            yield from map(self._shelf.get, self._names(self._next))
        else:
            for trajectory in self._trajectories:
                yield tuple(call for call in trajectory if call.graph == self._graph)

    def _names(self, stage: int) -> list[str]:
        return [f"{self._graph}-{stage:03d}-batch-{number:03d}" for number in range(len(self._trajectories))]

    def _drop(self, stage: int) -> None:
        for name in self._names(stage):
            self._shelf.drop(name)


def _in_memory(x: Tensor) -> Tensor:
    """A copy that begins where torch lets tensors begin: products may depend on how their factors are aligned."""
    return x if is_stand_in(x) else x.clone()
