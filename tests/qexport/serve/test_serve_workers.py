"""Drawers that end, hang or cannot start: no request is lost, no image is wrong, and the front goes on."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import toy_bundle

from qexport.errors import BundleError, InputError
from qexport.runtime import load
from qexport.serve import ServeSettings, engine
from qexport.serve.drawers import Batch, LocalDrawer, LostError
from qexport.serve.engine import Engine
from qexport.serve.failures import BrokenError, DeadlineError, DrainingError, InterruptedDrawingError
from qexport.serve.metrics import Metrics
from qexport.serve.private_copy import LOCK, keep, remove_leftovers
from qexport.serve.process_drawer import ProcessDrawer, devices_of, threads_of

WAIT_S = 60


class Frail(LocalDrawer):
    """A drawer that is lost, or does not start, as often as it is told."""

    def __init__(self, runtime):
        super().__init__(runtime)
        self.begun = True
        self.losses = self.refusals = self.starts = self.warm = self.stops = 0
        self.batches = []

    def start(self):
        self.starts += 1
        self.warm = 0
        if self.refusals:
            self.refusals -= 1
            raise InputError("no room")

    def draw(self, batch, limit_s=None):
        self.warm += 1
        if self.warm > 2:  # two buckets are warmed up
            self.batches.append(batch)
            if self.losses:
                self.losses -= 1
                raise LostError("worker 1 ended", self.begun)
        return super().draw(batch, limit_s)

    def stop(self):
        self.stops += 1


@pytest.fixture
def frail(toy, monkeypatch):
    """An engine with such drawers; its pauses are short."""
    monkeypatch.setattr(engine, "RESTART_S", (0.0, 0.01))
    engines = []

    def make(count=1, **settings):
        runtime = load(toy, provider="cpu", threads=1)
        drawers = [Frail(runtime) for _ in range(count)]
        limits = ServeSettings(**{"linger_ms": 0, "buckets": (2, 4), **settings})
        engines.append(Engine("it", runtime.bundle, drawers, "cpu", limits, Metrics()))
        return engines[-1], drawers

    yield make
    for one in engines:
        one.stop(WAIT_S)


def until(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def by_hand(labels, **how):
    return toy_bundle.expected(labels, **how).transpose(0, 2, 3, 1) * 255


def sample(it, name):
    return it._metrics.registry.get_sample_value(name, {"bundle": "it"})


def test_a_batch_whose_drawer_was_lost_is_drawn_again(frail):
    it, (drawer,) = frail()
    it.start()
    until(lambda: it.ready)
    drawer.losses = 1
    drawn = it.submit([1, 3, 2], {}, seed=9).future.result(WAIT_S)
    np.testing.assert_allclose(drawn.pixels, by_hand([1, 3, 2], seed=9), atol=0.5 + 1e-3)
    assert drawer.starts == 2
    assert [len(batch.images) for batch in drawer.batches] == [4, 4]
    assert sample(it, "qexport_lost_drawers_total") == 1
    assert sample(it, "qexport_redrawn_images_total") == 3


def test_a_request_that_ends_every_drawer_is_given_up_and_others_are_not(frail):
    it, (drawer,) = frail()
    it.start()
    until(lambda: it.ready)
    drawer.losses = 2
    with pytest.raises(InterruptedDrawingError, match="ended 2 times") as caught:
        it.submit([1], {}).future.result(WAIT_S)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
    np.testing.assert_allclose(it.submit([2], {}).future.result(WAIT_S).pixels, by_hand([2]), atol=0.5 + 1e-3)
    assert drawer.losses == 0


def test_drawers_that_had_ended_before_are_not_held_against_a_request(frail):
    it, (drawer,) = frail()
    it.start()
    until(lambda: it.ready)
    drawer.losses, drawer.begun = 3, False
    drawn = it.submit([2], {}, seed=4).future.result(WAIT_S)
    np.testing.assert_allclose(drawn.pixels, by_hand([2], seed=4), atol=0.5 + 1e-3)
    assert drawer.losses == 0


def test_one_drawer_does_the_work_of_another_that_does_not_start(frail):
    it, drawers = frail(count=2)
    drawers[0].refusals = 10**6
    it.start()
    until(lambda: it.ready)
    for seed in range(5):
        it.submit([1], {}, seed=seed).future.result(WAIT_S)
    assert len(drawers[1].batches) == 5
    assert sample(it, "qexport_drawers_ready") == 1
    drawers[0].refusals = 0
    until(lambda: sample(it, "qexport_drawers_ready") == 2)


def test_without_any_drawer_requests_wait_for_their_deadline(frail):
    it, (drawer,) = frail(deadline_s=0.3)
    drawer.refusals = 10**6
    it.start()
    until(lambda: drawer.starts > 2)
    assert it.alive
    assert not it.ready
    with pytest.raises(DeadlineError):
        it.submit([1], {}).future.result(WAIT_S)


def test_stopping_ends_while_no_drawer_starts(frail):
    it, (drawer,) = frail()
    drawer.refusals = 10**6
    it.start()
    until(lambda: drawer.starts > 2)
    waiting = it.submit([1], {})
    assert not it.stop(0.2)
    with pytest.raises(DrainingError):
        waiting.future.result(WAIT_S)
    until(lambda: not it.alive)
    assert drawer.stops == 1


@pytest.fixture
def worker(toy):
    """A drawer in a process."""
    drawer = ProcessDrawer(toy, "cpu", 1)
    drawer.start()
    yield drawer
    drawer.stop()


def batch_of(seed, label=1, **inputs):
    return Batch({"label": np.array([label] * 2), **inputs}, [(seed, 0), (seed, 1)])


def test_a_worker_draws_what_the_runtime_draws(worker, toy):
    want = load(toy, provider="cpu", threads=1).generate([1, 1], seed=4)
    np.testing.assert_array_equal(worker.draw(batch_of(4)), want)
    with pytest.raises(BrokenError, match="it must be 0 … 3"):
        worker.draw(batch_of(4, label=99))
    np.testing.assert_array_equal(worker.draw(batch_of(4)), want)


def test_a_killed_worker_is_lost_and_starts_again(worker):
    before, pid = worker.draw(batch_of(4)), worker.pid
    os.kill(pid, signal.SIGKILL)
    worker._process.join(WAIT_S)
    with pytest.raises(LostError, match=r"had ended \(exit code -9\)") as caught:
        worker.draw(batch_of(4))
    assert not caught.value.begun
    worker.start()
    assert worker.pid not in (pid, None)
    np.testing.assert_array_equal(worker.draw(batch_of(4)), before)


def test_a_worker_that_hangs_is_killed(worker):
    pid = worker.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(LostError, match="did not answer within"):
        worker.draw(batch_of(4), 0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_takes_no_signal_that_is_meant_for_the_front(worker):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert worker.draw(batch_of(1)).shape == (2, 3, 2, 2)


def test_a_worker_refuses_bytes_that_are_not_the_bundles(toy):
    with keep(toy) as bundle:
        drawer = ProcessDrawer(bundle.path, "cpu", 1)
        weights = bundle.path / "weights.data"
        weights.chmod(0o600)
        damaged = bytearray(weights.read_bytes())
        damaged[0] ^= 1
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match=r"weights\.data"):
            drawer.start()
        assert drawer.pid is None


def test_the_kept_copy_is_read_only_and_goes(toy):
    with keep(toy) as bundle:
        modes = {path.stat().st_mode & 0o777 for path in bundle.path.rglob("*") if path.is_file()}
        assert modes == {0o400}
        assert bundle.manifest == load(toy, provider="cpu").bundle.manifest
    assert not bundle.path.exists()


def test_a_damaged_bundle_is_not_kept(toy, tmp_path, monkeypatch):
    import shutil
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    damaged = tmp_path / "damaged"
    shutil.copytree(toy, damaged)
    (damaged / "weights.data").write_bytes(b"x" * (damaged / "weights.data").stat().st_size)
    with pytest.raises(BundleError, match=r"damaged.*weights\.data"), keep(damaged):
        pass
    assert not [*(tmp_path / "temporary").iterdir()]


def test_only_copies_that_nobody_uses_are_removed(toy, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, other = tmp_path / "qexport-serve-abandoned", tmp_path / "something-else"
    for folder in (abandoned, other):
        folder.mkdir()
        (folder / LOCK).touch()
    with keep(toy) as bundle:
        assert remove_leftovers() == [abandoned]
        assert bundle.path.exists()
    assert [*tmp_path.iterdir()] == [other]


@pytest.mark.parametrize(
    ("worker", "count", "visible", "device"),
    [
        (0, 0, None, None),
        (3, 1, None, None),
        (3, 2, None, "1"),
        (0, 2, "5,7", "5"),
        (1, 2, "GPU-a, GPU-b", "GPU-b"),
        (2, 2, "5,7", "5"),
        (0, 3, "5", None),
    ],
)
def test_workers_take_devices_in_turns(worker, count, visible, device):
    assert devices_of(worker, count, visible) == device


def test_workers_share_the_cores():
    assert threads_of(10**6, None) == 1
    assert threads_of(4, 3) == 3
