"""Trajectories of the full-precision model, kept as what its graphs were fed.

The model really samples: every scale and timestep, both branches of guidance (they are inside the graphs), classes in
turn, the plan's own settings; or images take the place of what it samples (`qexport.calibrate.shown`). Kept are the
small feeds; caches, which grow with depth, are carried again in the replay (`qexport.calibrate.replay`).

Every batch goes to disk as soon as it is through (`qexport.calibrate.shelf`). In a folder that a run before left
behind, batches that are there are not sampled again: a batch depends on nothing but the seed and its own number.

A replay keeps the activations between two stretches of a graph for every call that was kept. Where that would take
more than `WIRE_BYTES`, and the graph has no caches (those need every call), an even subset of the calls is kept:
another one in each batch, so that together they still cover all timesteps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from qexport.calibrate.shelf import RecordedCall, Shelf, Trajectory, stand_in
from qexport.calibrate.shown import Shown, from_images, own_samples
from qexport.errors import InputError
from qexport.family import Generator, GraphSpec, Port
from qexport.plan import Call, Plan, dim_size
from qexport.recipe import Calibration
from qexport.reference import torch_player
from qexport.runtime import CallRecord, Player

BATCH = 16
"""Images that are sampled together; enough for full use of two cores, and caches of a published size fit."""

WIRE_BYTES = 512 << 20
"""Of activations between two stretches of a graph: they are read and written at every stage."""


def caches(plan: Plan, spec: GraphSpec) -> dict[str, str]:
    """Input port → output port of the states that copies of a part keep for themselves (keys and values of a block)."""
    call = next((call for call in plan.calls if call.graph == spec.name), None)
    if call is None:
        return {}
    ports = {name for part in spec.all_parts for i in range(len(part.modules)) for name in own_ports(part.inputs, i)}
    empty = {state.name for state in plan.state if state.init == "zeros"}
    written = {f"state.{state}": port for port, state in call.outputs.items() if state in empty}
    return {port: written[source] for port, source in call.inputs.items() if port in ports and source in written}


def own_ports(ports: Iterable[Port], number: int) -> list[str]:
    """Names of the ports that copy `number` of a part has for itself: those with ``{i}`` in their name."""
    return [port.name.format(i=number) for port in ports if "{i}" in port.name]


class _EnoughSeen(Exception):  # noqa: N818
    """Nothing that follows in this batch is kept, so it need not be computed: mostly the decoder."""


class Recording(Sequence[Trajectory]):
    """The trajectories of all batches in order, read from disk each time that one is asked for."""

    def __init__(
        self,
        shelf: Shelf,
        names: Sequence[str],
        left_out: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """Take the shelf and the names on it.

        `left_out` says of graphs of which not every call was kept how many of how many were not.
        """
        self._shelf, self._names = shelf, names
        self.left_out = left_out or {}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> Trajectory:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        return self._shelf.get(self._names[number])

    def __iter__(self) -> Iterator[Trajectory]:
        return map(self._shelf.get, self._names)


def record(
    generator: Generator,
    calibration: Calibration,
    graphs: Collection[str],
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Recording:
    """Play `calibration.samples` images and keep the feeds of these graphs; `progress` is told images done, and all.

    `folder` is that of this model, calibration and these graphs alone; without one, a temporary folder lives as long
    as what is returned.

    Raises:
        InputError: the model has no such schedule, images are wanted that nobody gave, or the disk is full.
    """
    player = torch_player(generator)
    if calibration.schedule is not None:
        player = player.with_schedule(calibration.schedule)
    specs = {spec.name: spec for spec in generator.graphs if spec.name in graphs}
    own = {name: caches(player.plan, spec) for name, spec in specs.items()}
    starts = range(0, calibration.samples, BATCH)
    kept = [
        _kept_iterations(call, specs[call.graph], own[call.graph], calibration.samples, len(starts), generator)
        if call.graph in specs
        else []
        for call in player.plan.calls
    ]
    wanted = [number for number, iterations in enumerate(kept) if iterations]
    last = wanted[-1] if wanted else -1
    shelf = Shelf(folder)
    names = [f"batch-{number:03d}" for number in range(len(starts))]
    for number, start in enumerate(starts):
        end = min(start + BATCH, calibration.samples)
        if shelf.holds(names[number]):
            continue
        found: list[RecordedCall] = []

        def keep(call: CallRecord[Tensor], number: int = number, found: list[RecordedCall] = found) -> None:
            if not kept[call.call] or call.iteration not in kept[call.call][number]:
                return
            feeds = {name: stand_in(value) if name in own[call.graph] else value for name, value in call.feeds.items()}
            step = step_of(generator, player.plan.calls[call.call], call.iteration)
            found.append(RecordedCall(call.graph, step, feeds))
            if call.call == last and call.iteration == max(kept[last][number]):
                raise _EnoughSeen

        shown = _shown(generator, player, calibration, start, end)
        with contextlib.suppress(_EnoughSeen):
            shown.player.play(shown.inputs, seed=calibration.seed, first_index=start, batch=end - start, observer=keep)
        shelf.put(names[number], found)
        if progress is not None:
            progress(end, calibration.samples)
    return Recording(shelf, names, _left_out(player.plan, specs, kept))


def _left_out(
    plan: Plan, specs: Collection[str], kept: Sequence[Sequence[frozenset[int]]]
) -> dict[str, tuple[int, int]]:
    """`Recording.left_out`; `kept` has the iterations of each call of the plan, batch by batch."""
    found: dict[str, tuple[int, int]] = {}
    for call, batches in zip(plan.calls, kept, strict=True):
        left, made = found.get(call.graph, (0, 0))
        every = call.iterations * len(batches)
        found[call.graph] = left + every - sum(map(len, batches)), made + every
    return {graph: counts for graph, counts in found.items() if graph in specs and counts[0]}


def _shown(generator: Generator, player: Player[Tensor], calibration: Calibration, start: int, end: int) -> Shown:
    """What images `start` … `end` − 1 are made of."""
    images = calibration.images
    if images is None:
        return own_samples(player, np.arange(start, end, dtype=np.int64) % generator.entry.num_classes)
    if images.load is None:
        raise InputError(f"calibration needs the images of {images.name!r}; say where they are by --calibration-data")
    pixels, labels = images.load(start, end)
    return from_images(generator, player, pixels, labels, seed=calibration.seed, first_index=start)


def step_of(generator: Generator, call: Call, iteration: int) -> int | None:
    """The step of one iteration of a call (`qexport.family.StepSpec`)."""
    steps = generator.steps
    if steps is None or steps.graph != call.graph:
        return None
    for source in call.inputs.values():
        kind, _, table = source.partition(".")
        if kind == "row" and table in steps.index:
            return int(steps.index[table][iteration])
    return iteration


def _kept_iterations(
    call: Call, spec: GraphSpec, own: Mapping[str, str], samples: int, batches: int, generator: Generator
) -> list[frozenset[int]]:
    """For each batch, which iterations of the call are kept."""
    every = call.iterations
    bytes_per_image = _wire_bytes(spec)
    if own or every == 1 or not bytes_per_image:
        return [frozenset(range(every))] * batches
    steps = generator.steps.count if generator.steps is not None else 1
    keep = max(WIRE_BYTES // (bytes_per_image * samples), -(-steps // batches))
    if keep >= every:
        return [frozenset(range(every))] * batches
    slots = keep * batches
    return [
        frozenset((2 * slot + 1) * every // (2 * slots) for slot in range(b, slots, batches)) for b in range(batches)
    ]


def _wire_bytes(spec: GraphSpec) -> int:
    """Bytes per image of what flows between the parts of a graph; 0 if that depends on more than the batch."""
    wires = {port.name: port for part in spec.all_parts for port in part.outputs if "{i}" not in port.name}
    try:
        sizes = [[dim_size(dim, {"batch": 1}) for dim in port.shape] for port in wires.values()]
    except KeyError:
        return 0
    return sum(
        int(np.prod(size)) * np.dtype(port.dtype).itemsize for size, port in zip(sizes, wires.values(), strict=True)
    )
