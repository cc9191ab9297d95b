"""The engine: right images whatever the company, limits kept, and no request left without an end."""

from __future__ import annotations

import time
from concurrent.futures import wait

import numpy as np
import pytest
import toy_bundle

from qexport.errors import InputError
from qexport.runtime import load
from qexport.runtime.pixels import to_pixels
from qexport.serve import ServeSettings
from qexport.serve.drawers import Batch, LocalDrawer
from qexport.serve.engine import Engine
from qexport.serve.failures import BadRequestError, BrokenError, BusyError, DeadlineError, DrainingError
from qexport.serve.metrics import Metrics

WAIT_S = 60


class Recorded:
    """An engine whose batches are recorded, and can be held back or spoilt."""

    def __init__(self, path, **settings):
        self.metrics = Metrics()
        self.runtime = load(path, provider="cpu", threads=1)
        self.batches: list[Batch] = []
        self.before = lambda batch: None
        self.after = lambda images: images
        outer = self

        class Drawer(LocalDrawer):
            def _play(self, batch):
                if not outer.engine._up:
                    return super()._play(batch)  # warming up
                outer.before(batch)
                outer.batches.append(batch)
                return outer.after(super()._play(batch))

        limits = ServeSettings(**{"linger_ms": 0, **settings})
        self.engine = Engine("it", self.runtime.bundle, [Drawer(self.runtime)], "cpu", limits, self.metrics)

    def __enter__(self):
        self.engine.start()
        deadline_s = time.monotonic() + WAIT_S
        while not self.engine.ready and time.monotonic() < deadline_s:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self.before = lambda batch: None
        assert self.engine.stop(WAIT_S)

    def sample(self, name):
        return self.metrics.registry.get_sample_value(name, {"bundle": "it"})

    def queue_behind(self, *requests, **settings):
        """Submit requests while the engine is busy with another one, so that they wait together."""
        import threading

        started, go_on = threading.Event(), threading.Event()

        def hold(batch):
            started.set()
            assert go_on.wait(WAIT_S)
            self.before = lambda batch: None

        self.before = hold
        first = self.engine.submit([0], {})
        assert started.wait(WAIT_S)
        jobs = [self.engine.submit(labels, given, **more) for labels, given, more in requests]
        go_on.set()
        return first, jobs


def pixels(job):
    return job.future.result(WAIT_S).pixels


def by_hand(labels, **how):
    return toy_bundle.expected(labels, **how).transpose(0, 2, 3, 1) * 255


def test_images_are_those_of_the_bundle(toy):
    with Recorded(toy, buckets=(2, 4)) as it:
        requests = [
            ([1, 3], {"gain": 0.5}, {"seed": 9}),
            ([2], {"gain": 0.5}, {"seed": 1, "first_index": 7}),
            ([2], {"gain": 0.25}, {"seed": 1}),
            ([0], {"gain": 0.5, "shift": 0.125}, {"seed": 2}),
        ]
        _, jobs = it.queue_behind(*requests)
        for (labels, given, more), job in zip(requests, jobs, strict=True):
            # float32 against float64: a value may lie on the other side of a rounding boundary
            np.testing.assert_allclose(pixels(job), by_hand(labels, **given, **more), atol=0.5 + 1e-3)
    sizes = [len(batch.images) for batch in it.batches]
    assert sizes == [2, 4, 2]  # one alone; 2 + 1 + 1 of the same gain, whatever their shift; and the other gain
    assert it.sample("qexport_images_total") == 6
    assert it.sample("qexport_padding_images_total") == 2


def test_company_and_place_change_no_byte(w4_bundle):
    wanted = ([5], {"cfg": 2.0}, {"seed": 42, "first_index": 7})
    company = [([i], {"cfg": 2.0}, {"seed": 100 + i}) for i in range(3)]
    with Recorded(w4_bundle.path, buckets=(4,)) as it:
        alone = pixels(it.engine.submit(wanted[0], wanted[1], **wanted[2]))
        for place in range(4):
            _, jobs = it.queue_behind(*company[:place], wanted, *company[place:])
            drawn = jobs[place].future.result(WAIT_S)
            np.testing.assert_array_equal(drawn.pixels, alone)
            assert drawn.buckets == (4,)
            assert (pixels(jobs[(place + 1) % 4]) != alone).any()
    assert {len(batch.images) for batch in it.batches} == {4}
    offline = it.runtime.generate([5] * 4, seed=42, first_index=7, batch=4, cfg=2.0)[:1]
    np.testing.assert_array_equal(to_pixels(offline), alone)


def test_a_request_larger_than_a_batch_is_split(toy):
    with Recorded(toy, buckets=(2,)) as it:
        drawn = it.engine.submit([0, 1, 2, 3, 0], {}, seed=3).future.result(WAIT_S)
    np.testing.assert_allclose(drawn.pixels, by_hand([0, 1, 2, 3, 0], seed=3), atol=0.5 + 1e-3)
    assert drawn.buckets == (2,) * 5


def test_a_lonely_image_waits_for_company(toy):
    with Recorded(toy, buckets=(2, 8), linger_ms=2000) as it:
        jobs = [it.engine.submit([1], {}, seed=i) for i in range(8)]
        begun_s = time.monotonic()
        wait([job.future for job in jobs], WAIT_S)
        assert time.monotonic() - begun_s < 1.5  # a full batch does not wait
    assert [len(batch.images) for batch in it.batches] == [8]


def test_a_full_queue_says_when_to_come_back(toy):
    with Recorded(toy, queue_images=4, max_images=4) as it:
        first, jobs = it.queue_behind(([0, 1, 2, 3], {}, {}))
        pixels(jobs[0])
        it.engine._image_s = 2.5

        def overfill(batch):
            it.engine.submit([0, 1, 2], {})
            with pytest.raises(BusyError, match="3 images wait already; ask again in 8 s") as caught:
                it.engine.submit([0, 1], {})
            assert caught.value.retry_after_s == 8

        it.before = lambda batch: (setattr(it, "before", lambda batch: None), overfill(batch))
        pixels(it.engine.submit([0], {}))
    assert first.over


def test_what_is_too_late_is_not_drawn(toy):
    with Recorded(toy) as it:
        begun_s = time.monotonic()

        def hold(batch):
            time.sleep(0.3)

        it.before = hold
        first = it.engine.submit([0], {})
        time.sleep(0.05)
        late = it.engine.submit([1, 2], {"gain": 0.5}, seed=99, timeout_s=0.1)
        with pytest.raises(DeadlineError):
            late.future.result(WAIT_S)
        assert time.monotonic() - begun_s < 5
        pixels(first)
        it.before = lambda batch: None
        pixels(it.engine.submit([3], {}))
    assert 99 not in {seed for batch in it.batches for seed, _ in batch.images}
    assert it.sample("qexport_dropped_images_total") == 2


def test_a_request_that_was_given_up_is_not_drawn(toy):
    with Recorded(toy) as it:
        _, (kept, dropped) = it.queue_behind(([1], {}, {}), ([2], {"gain": 0.5}, {}))
        dropped.future.cancel()
        pixels(kept)
    assert it.sample("qexport_dropped_images_total") in (0, 1)  # it may have been taken before


def test_a_failed_batch_fails_its_requests_and_no_others(toy):
    with Recorded(toy) as it:

        def spoil(error):
            def before(batch):
                it.before = lambda batch: None
                raise error

            it.before = before
            return it.engine.submit([0], {})

        with pytest.raises(BrokenError, match="out of memory"):
            pixels(spoil(InputError("graph 'step': out of memory")))
        with pytest.raises(BrokenError, match="ZeroDivisionError"):
            pixels(spoil(ZeroDivisionError("secret")))
        assert it.engine.ready
        np.testing.assert_allclose(pixels(it.engine.submit([2], {})), by_hand([2]), atol=0.5 + 1e-3)


def test_images_that_are_not_finite_are_refused(toy):
    def spoil(images):
        images[0] = np.nan
        return images

    with Recorded(toy, buckets=(2,)) as it:
        _, (bad, good) = it.queue_behind(([1], {}, {}), ([2], {}, {"seed": 4}))
        it.after = spoil
        with pytest.raises(BadRequestError, match="not finite"):
            pixels(bad)
        np.testing.assert_allclose(pixels(good), by_hand([2], seed=4), atol=0.5 + 1e-3)


def test_stopping_draws_what_waits_and_takes_no_more(toy):
    it = Recorded(toy, linger_ms=0)
    with it:
        _, jobs = it.queue_behind(([1], {}, {}), ([2], {"gain": 0.5}, {}))
    for job in jobs:
        pixels(job)
    with pytest.raises(DrainingError):
        it.engine.submit([0], {})


@pytest.mark.parametrize(
    ("labels", "settings", "more", "says"),
    [
        ([4], {}, {}, "it must be 0 … 3"),
        ([0], {"gian": 1}, {}, "did you mean 'gain'"),
        ([0], {"label": 1}, {}, "labels"),
        ([0], {"gain": -1}, {}, "at least 0"),
        ([2**70], {}, {}, "not a number that fits int64"),
        ([0], {}, {"schedule": "ddim-25"}, "unknown schedule"),
    ],
)
def test_what_the_bundle_cannot_do_is_refused_at_once(toy, labels, settings, more, says):
    with Recorded(toy) as it, pytest.raises(BadRequestError, match=says):
        it.engine.submit(labels, settings, **more)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"buckets": (1, 2)}, "at least 2"),
        ({"buckets": (4, 2)}, "ascending"),
        ({"buckets": ()}, "ascending"),
        ({"queue_images": 0}, "queue_images"),
        ({"queue_images": 3}, "never fit"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"linger_ms": -1}, "linger_ms"),
    ],
)
def test_settings_that_cannot_be_meant(values, says):
    with pytest.raises(InputError, match=says):
        ServeSettings(**values)
