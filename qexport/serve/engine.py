"""One bundle, one queue, a thread for each drawer: images of many requests drawn together.

A thread takes the request that waited longest, adds images of the same group (see `jobs`) up to the largest bucket,
fills the batch up with copies of its last row to the smallest bucket that holds it, and has it drawn. Noise belongs
to an image and the kernels treat rows alike, so an image depends on its label, seed, number, settings and bucket, not
on its company or its place among them (`tests/qexport/serve/test_serve_engine.py` holds that to the byte). Buckets
differ from each other by rounding.

If a drawer is lost, its batch goes back to the head of the queue and the thread starts the drawer anew; the second
time it happens to a request that was being drawn, it is answered 503, as it may be what ends them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.runtime.inputs import label_input
from qexport.runtime.pixels import to_pixels
from qexport.serve.drawers import Batch, Drawer, LostError
from qexport.serve.failures import (
    BadRequestError,
    BrokenError,
    BusyError,
    DeadlineError,
    DrainingError,
    InterruptedDrawingError,
)
from qexport.serve.jobs import Job, Row, batch_of, fail_all, make_job
from qexport.serve.logs import event
from qexport.serve.metrics import Metrics
from qexport.serve.settings import ServeSettings

PACE_WEIGHT = 0.2
"""Weight of the newest batch in the running mean of seconds per image: five batches make up most of it."""

MAX_LOSSES = 2
"""A request that was being drawn by this many drawers that ended is given up."""

RESTART_S = (0.0, 0.5, 1.0, 2.0, 5.0, 15.0)
"""Pauses before a drawer is started again, the last one for all later attempts: at once after a chance kill, seldom
where it cannot start at all."""

HUNG_S = 5.0
"""How much longer than the deadline of the service a batch may take until its drawer is taken for hung."""

STOPPED = "the service stopped before the turn of this request came"


class Engine:
    """Draws the images of one bundle. `start` it before the first `submit`; all methods may be called by any thread."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        drawers: Sequence[Drawer],
        provider: str,
        settings: ServeSettings,
        metrics: Metrics,
    ) -> None:
        """Take a bundle and what draws it; nothing runs yet.

        Raises:
            InputError: the bundle takes no class labels.
        """
        self.name = name
        self.bundle = bundle
        self.provider = provider
        self.settings = settings
        self._metrics = metrics
        if label_input(bundle.plan) is None:
            raise InputError(f"{name}: takes no class labels, so it cannot be served")
        self._drawers = tuple(drawers)
        self._queue: deque[Row] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._closed = False
        self._up: set[int] = set()
        self._image_s = 0.0
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"engine-{name}-{i}", daemon=True)
            for i in range(len(self._drawers))
        ]
        metrics.queued.labels(name).set_function(lambda: len(self._queue))
        metrics.drawers.labels(name).set_function(lambda: len(self._up))
        metrics.lost.labels(name)
        metrics.again.labels(name)

    @property
    def ready(self) -> bool:
        """Whether at least one drawer draws, and requests are taken."""
        return bool(self._up) and self.alive and not self._stopping

    @property
    def alive(self) -> bool:
        """Whether all its threads run."""
        return all(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        """Start the threads; each starts its drawer and draws one batch of each bucket first."""
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        labels: Sequence[int],
        settings: Mapping[str, Any],
        *,
        seed: int = 0,
        first_index: int = 0,
        schedule: str | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """Queue one request; its future ends with `Drawn`, or with a `RequestError`.

        Raises:
            BadRequestError: the bundle cannot do what is asked.
            BusyError: the queue has no room for it.
            DrainingError: the engine was told to stop, or has died.
        """
        wait_s = min(timeout_s or self.settings.deadline_s, self.settings.deadline_s)
        try:
            job = make_job(
                self.bundle.plan,
                labels,
                settings,
                seed=seed,
                first_index=first_index,
                schedule=schedule,
                deadline_s=time.monotonic() + wait_s,
            )
        except InputError as error:
            raise BadRequestError(str(error)) from error
        with self._changed:
            if self._stopping or not self.alive:
                raise DrainingError("the service is stopping; ask another one")
            self._drop_dead_rows()
            waiting = len(self._queue)
            if waiting + len(labels) > self.settings.queue_images:
                after_s = max(1, math.ceil(waiting * self._image_s / max(1, len(self._up))))
                raise BusyError(f"{waiting} images wait already; ask again in {after_s} s", after_s)
            self._queue.extend(job.rows)
            self._changed.notify_all()
        return job

    def stop(self, wait_s: float) -> bool:
        """Take no more requests, draw what is queued, and end; True if that was done within `wait_s`."""
        end_s = time.monotonic() + wait_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end_s - time.monotonic()))
        drained = not any(thread.is_alive() for thread in self._threads) and not self._queue
        with self._changed:
            self._closed = True
            fail_all(self._queue, DrainingError(STOPPED))
            self._queue.clear()
            self._changed.notify_all()
        if not drained:
            for drawer in self._drawers:
                drawer.kill()
        return drained

    def _run(self, lane: int) -> None:
        """What the thread of drawer number `lane` does."""
        drawer = self._drawers[lane]
        attempts = 0
        try:
            while True:
                if lane not in self._up:
                    if not self._pause(RESTART_S[min(attempts, len(RESTART_S) - 1)]):
                        return
                    attempts += 1
                    if not self._warm_up(drawer):
                        continue
                    attempts = 0
                    with self._changed:
                        self._up.add(lane)
                    event("ready", bundle=self.name, drawer=lane, buckets=self.settings.buckets)
                rows = self._next_batch()
                if not rows:
                    return
                try:
                    self._draw(drawer, rows)
                except LostError as error:
                    event("drawer lost", logging.ERROR, bundle=self.name, drawer=lane, why=str(error))
                    self._take_back(lane, rows, error.begun)
        finally:
            with self._changed:
                self._up.discard(lane)
            drawer.stop()

    def _pause(self, seconds: float) -> bool:
        """Wait before an attempt to start; False if there is nothing left to start for."""
        end_s = time.monotonic() + seconds
        with self._changed:
            while True:
                self._drop_dead_rows()
                # On the way out, what waits is drawn by the others; only if there are none, it is worth an attempt.
                if self._closed or (self._stopping and (self._up or not self._queue)):
                    return False
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return True
                self._changed.wait(left_s)

    def _warm_up(self, drawer: Drawer) -> bool:
        """Start it and draw a batch of each bucket: first runs allocate memory, and what does not fit must show now."""
        port = label_input(self.bundle.plan)
        assert port is not None
        size = 0
        try:
            drawer.start()
            for size in self.settings.buckets:
                drawer.draw(Batch({port.name: np.zeros(size, port.dtype)}, [(0, i) for i in range(size)]))
        except (InputError, BrokenError, LostError) as error:
            event("warm-up failed", logging.ERROR, bundle=self.name, bucket=size, why=str(error))
            return False
        except Exception as error:  # whatever it is, the thread must live on to try again
            event("warm-up failed", logging.ERROR, error, bundle=self.name, bucket=size)
            return False
        return True

    def _next_batch(self) -> list[Row] | None:
        """Rows of one group, the longest-waiting one's; None when there is nothing left to do."""
        largest = self.settings.buckets[-1]
        with self._changed:
            while True:
                self._drop_dead_rows()
                if not self._queue:
                    if self._stopping:
                        return None
                    self._changed.wait()
                    continue
                head = self._queue[0].job
                rows = [row for row in self._queue if row.job.group == head.group][:largest]
                linger_s = head.arrived_s + self.settings.linger_ms / 1000 - time.monotonic()
                if len(rows) < largest and linger_s > 0 and not self._stopping:
                    self._changed.wait(linger_s)
                    continue
                taken = set(map(id, rows))
                self._queue = deque(row for row in self._queue if id(row) not in taken)
                return rows

    def _drop_dead_rows(self) -> None:
        now_s = time.monotonic()
        before = len(self._queue)
        for row in self._queue:
            if now_s >= row.job.deadline_s:
                row.job.fail(DeadlineError("the images were not ready in time; ask for fewer, or again later"))
        if any(row.job.over for row in self._queue):
            self._queue = deque(row for row in self._queue if not row.job.over)
            self._metrics.dropped.labels(self.name).inc(before - len(self._queue))

    def _take_back(self, lane: int, rows: list[Row], begun: bool) -> None:
        """Put the rows of a lost drawer back where they came from, but not for ever if it had begun them."""
        self._metrics.lost.labels(self.name).inc()
        for job in {id(row.job): row.job for row in rows}.values():
            job.losses += begun
            if job.losses >= MAX_LOSSES:
                text = f"what drew this ended {job.losses} times before the images were there"
                job.fail(InterruptedDrawingError(text))
        again = [row for row in rows if not row.job.over]
        self._metrics.again.labels(self.name).inc(len(again))
        with self._changed:
            self._up.discard(lane)
            if self._closed:
                fail_all(again, DrainingError(STOPPED))
            else:
                self._queue.extendleft(reversed(again))
            self._changed.notify_all()

    def _draw(self, drawer: Drawer, rows: list[Row]) -> None:
        start_s = time.monotonic()
        bucket = self.settings.bucket(len(rows))
        for row in rows:
            if row.job.started_s is None:
                row.job.started_s = start_s
        batch = batch_of(rows + [rows[-1]] * (bucket - len(rows)))
        try:
            images_NCHW = drawer.draw(batch, self.settings.deadline_s + HUNG_S)
        except BrokenError as error:
            fail_all(rows, error)
            return
        except LostError:
            raise
        except Exception as error:
            event("batch failed", logging.ERROR, error, bundle=self.name, bucket=bucket)
            fail_all(rows, BrokenError(f"drawing failed ({type(error).__name__})"))
            return
        spent_s = time.monotonic() - start_s
        self._image_s += PACE_WEIGHT * (spent_s / len(rows) - self._image_s) if self._image_s else spent_s / len(rows)
        self._metrics.batch_s.labels(self.name, str(bucket)).observe(spent_s)
        self._metrics.padding.labels(self.name).inc(bucket - len(rows))
        self._deliver(rows, images_NCHW, bucket)

    def _deliver(self, rows: list[Row], images_NCHW: np.ndarray, bucket: int) -> None:
        for row, image_CHW in zip(rows, images_NCHW, strict=False):  # what is left are copies that fill the bucket
            if np.isfinite(image_CHW).all():
                row.job.take(row.index, to_pixels(image_CHW[None])[0], bucket)
                self._metrics.images.labels(self.name).inc()
            else:
                row.job.fail(BadRequestError("the images have values that are not finite; use less extreme settings"))
