"""One request as the engine sees it, and its images as rows of a batch.

Rows of different requests may share a batch if they agree in everything that is one value for the whole batch: the
schedule, and inputs of the plan of shape (). What is given per image (label, seed, number) differs freely.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qexport.plan import Plan
from qexport.runtime.inputs import check_inputs, is_per_image, label_input, to_arrays
from qexport.serve.drawers import Batch
from qexport.serve.failures import BadRequestError


@dataclass
class Drawn:
    """The images of one request: `pixels` (n, H, W, 3) uint8, and the bucket that each was drawn in."""

    pixels: np.ndarray
    buckets: tuple[int, ...]
    queued_s: float


@dataclass(eq=False)
class Job:
    """One request. `group` decides whose rows may share a batch; `deadline_s` is on the monotonic clock.

    `losses` counts the drawers that ended while they drew it.
    """

    group: tuple[Any, ...]
    schedule: str | None
    shared: Mapping[str, np.ndarray]
    per_image: Mapping[str, np.ndarray]
    images: Sequence[tuple[int, int]]
    deadline_s: float
    future: Future[Drawn] = field(default_factory=Future)
    arrived_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    buckets: dict[int, int] = field(default_factory=dict)
    losses: int = 0

    @property
    def rows(self) -> list[Row]:
        """All images of the request."""
        return [Row(self, i) for i in range(len(self.images))]

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()

    def fail(self, error: Exception) -> None:
        """End it without images, unless it has ended."""
        with contextlib.suppress(InvalidStateError):  # the other side may give up at the same moment
            self.future.set_exception(error)

    def take(self, index: int, pixels_HWC: np.ndarray, bucket: int) -> None:
        """Keep one image; with the last one the request is done."""
        self.pixels[index], self.buckets[index] = pixels_HWC, bucket
        if len(self.pixels) < len(self.images):
            return
        order = range(len(self.images))
        started_s = self.started_s if self.started_s is not None else self.arrived_s
        stacked = np.stack([self.pixels[i] for i in order])
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(Drawn(stacked, tuple(self.buckets[i] for i in order), started_s - self.arrived_s))


@dataclass(frozen=True)
class Row:
    """Image number `index` of a job."""

    job: Job
    index: int


def make_job(
    plan: Plan,
    labels: Sequence[int],
    settings: Mapping[str, Any],
    *,
    seed: int,
    first_index: int,
    schedule: str | None,
    deadline_s: float,
) -> Job:
    """Check a request against the plan of its bundle.

    Raises:
        InputError: an input is unknown, missing or out of range, or there is no such schedule.
        BadRequestError: the bundle takes no labels.
    """
    port = label_input(plan)
    if port is None:
        raise BadRequestError("this bundle takes no class labels, so it cannot be served")
    if port.name in settings:
        raise BadRequestError(f"settings.{port.name}: classes are given as labels")
    if schedule is not None:
        plan.with_schedule(schedule)
    given = to_arrays(plan, {**settings, port.name: list(labels)})
    checked = check_inputs(plan, given, {**plan.dims, "batch": len(labels)})
    per_image = {i.name: checked[i.name] for i in plan.inputs if is_per_image(i)}
    shared = {name: value for name, value in checked.items() if name not in per_image}
    name = schedule or plan.schedule
    group = (name, *((key, value.tobytes()) for key, value in sorted(shared.items())))
    images = [(seed, first_index + i) for i in range(len(labels))]
    return Job(group, name or None, shared, per_image, images, deadline_s)


def batch_of(rows: Sequence[Row]) -> Batch:
    """Rows of one group as one batch."""
    job = rows[0].job
    per_image = {name: np.stack([row.job.per_image[name][row.index] for row in rows]) for name in job.per_image}
    images = [row.job.images[row.index] for row in rows]
    return Batch({**job.shared, **per_image}, images, job.schedule)


def fail_all(rows: Iterable[Row], error: Exception) -> None:
    """End the requests of all rows without images."""
    for row in rows:
        row.job.fail(error)
