"""Error of middle representations: ‖x_q − x‖ / ‖x‖ of the residual stream after every block, at every call.

Two ways of asking, on the same labels and noise:

- *forced*: the full-precision model plays, and the quantised one gets the very inputs of each call: what a call adds
  (where there is a cache of keys and values, it is full precision's)
- *free*: both play by themselves: what has piled up. Where tokens are drawn, this holds tokens that differ.

Sums are kept for each image, and intervals are of drawing images (`qexport.scaling.analysis.resampled`).

Legend: N images, S calls of the graph, D blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from qexport.family import Generator
from qexport.runtime import CallRecord
from qexport.scaling.analysis.resampled import Resampled, estimate, relative_l2, squares, to_json
from qexport.scaling.analysis.streams import Streams
from qexport.scaling.analysis.subject import Subject, subject_of
from qexport.verify.trajectory import label_inputs, labels_for

FORCED, FREE = "forced", "free"
OUTPUT, STATE = "output", "state"

_Call = tuple[list[Tensor], Tensor, Tensor]


@dataclass(frozen=True)
class MiddleErrors:
    """Relative L2 over `samples` trajectories.

    `forced` and `free` are (S, D) of the blocks; `forced_output`, `free_output` (S,) of what the graph predicts;
    `forced_state`, `free_state` (S,) of what it hands on.
    """

    forced: Resampled
    free: Resampled
    forced_output: Resampled
    free_output: Resampled
    forced_state: Resampled
    free_state: Resampled
    samples: int

    def ratios(self) -> dict[str, Resampled]:
        """What grows with what, all of forced errors and (S,).

        `depth`: after the last block over after the first; `output_over_first`, `block_over_first` (the last block) and
        `state_over_first`: at a call over at the first one.
        """
        last = self.forced[:, -1]
        return {
            "depth": last / self.forced[:, 0],
            "block_over_first": last / last[:1],
            "output_over_first": self.forced_output / self.forced_output[:1],
            "state_over_first": self.forced_state / self.forced_state[:1],
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        errors = {name: value for name, value in vars(self).items() if isinstance(value, Resampled)}
        return {**to_json(errors), "ratios": to_json(self.ratios()), "samples": self.samples}


def middle_errors(
    full: Generator,
    quantised: Generator,
    *,
    samples: int,
    seed: int = 0,
    batch: int = 10,
    inputs: Mapping[str, Any] | None = None,
) -> MiddleErrors:
    """Errors of `quantised` on `samples` trajectories; trajectory i has class i modulo the number of classes.

    Raises:
        UnsupportedError: the model has no blocks, or neither draws nor denoises.
    """
    pair = _Pair(subject_of(full), subject_of(quantised))
    labels = labels_for(samples, full.entry.num_classes)
    for start in range(0, samples, batch):
        given = {**(inputs or {}), **label_inputs(full.plan, labels[start : start + batch])}
        pair.play(given, seed, start)
    calls = 1 + max(call for _, call, _ in pair.sums)
    depth = len(Streams(pair.ours).blocks)

    def table(way: str, places: list[int | str]) -> Resampled:
        cells_SD = [[pair.sums[way, call, place] for place in places] for call in range(calls)]
        sums_SD2N = np.array([[np.concatenate(parts, axis=1) for parts in row] for row in cells_SD])
        error_NSD, power_NSD = np.moveaxis(sums_SD2N, (2, 3), (0, 1))
        return estimate(relative_l2, error_NSD, power_NSD)

    blocks: list[int | str] = list(range(depth))
    return MiddleErrors(
        forced=table(FORCED, blocks),
        free=table(FREE, blocks),
        forced_output=table(FORCED, [OUTPUT])[:, 0],
        free_output=table(FREE, [OUTPUT])[:, 0],
        forced_state=table(FORCED, [STATE])[:, 0],
        free_state=table(FREE, [STATE])[:, 0],
        samples=samples,
    )


class _Pair:
    """The two models, and the sums of what was compared: way, call, and block or what the graph gives.

    One entry a batch, (2, images of the batch): Σ (x_q − x)² and Σ x².
    """

    def __init__(self, ours: Subject, theirs: Subject) -> None:
        self.ours, self.theirs = ours, theirs
        self.sums: dict[tuple[str, int, int | str], list[np.ndarray]] = defaultdict(list)
        self._backend = theirs.player.backend
        self._wanted: list[_Call] = []

    def play(self, given: Mapping[str, Any], seed: int, first: int) -> None:
        """One batch, forced and free."""
        self._wanted = []
        extra = {self.ours.graph: (self.ours.output, self.ours.state)}
        with Streams(self.ours) as ours, Streams(self.theirs) as theirs:

            def force(record: CallRecord[Tensor]) -> None:
                if record.graph == self.ours.graph:
                    self._wanted.append((ours.taken(), *self._given(record.results)))
                    found = self._backend.run(record.graph, record.feeds, (self.theirs.output, self.theirs.state))
                    self._add(FORCED, record.iteration, (theirs.taken(), *self._given(found)))

            def free(record: CallRecord[Tensor]) -> None:
                if record.graph == self.theirs.graph:
                    self._add(FREE, record.iteration, (theirs.taken(), *self._given(record.results)))

            for subject, observer in ((self.ours, force), (self.theirs, free)):
                subject.player.play(given, seed=seed, first_index=first, observer=observer, extra_outputs=extra)

    def _given(self, results: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return results[self.ours.output], results[self.ours.state]

    def _add(self, way: str, call: int, found: _Call) -> None:
        wanted = self._wanted[call]
        images = len(wanted[2])  # the state has one row an image; blocks have more where guidance doubles them
        places: list[tuple[int | str, Tensor, Tensor]] = [
            *((block, a, b) for block, (a, b) in enumerate(zip(found[0], wanted[0], strict=True))),
            (OUTPUT, found[1], wanted[1]),
            (STATE, found[2], wanted[2]),
        ]
        for place, a, b in places:
            self.sums[way, call, place].append(np.stack(squares(a.detach().numpy(), b.detach().numpy(), images)))
