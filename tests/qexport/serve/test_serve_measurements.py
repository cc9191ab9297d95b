"""The arithmetic of `benchmarks/serve_*.py`: a measurement that cannot report a failure proves nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import serve_common
import serve_faults
import serve_load
import serve_trial
from serve_common import Load, Record


def test_rates_and_latencies_count_images_only():
    records = [Record(at_s=t, latency_s=t / 10, status=200, bucket=2) for t in range(1, 101)]
    records += [Record(50.5, 9.0, 429), Record(50.6, 0.1, serve_common.UNREACHABLE), Record(200.0, 99.0, 200)]
    found = serve_common.summary(records, 0.0, 100.0)
    assert found["images_per_s"] == 1.0
    assert found["p50_ms"] == 5100  # the 51st of 100
    assert found["p99_ms"] == 10000
    assert found["statuses"] == {"0": 1, "200": 100, "429": 1}
    assert found["buckets"] == {"2": 100}


def test_memory_that_grows_is_seen_and_the_beginning_is_not():
    flat = [(float(t), 500.0 if t < 10 else 300.0) for t in range(0, 101)]
    assert serve_load.slope(flat)["MB_per_hour"] == 0
    leak = [(float(t), 300.0 + t / 360) for t in range(0, 3601, 60)]
    assert serve_load.slope(leak)["MB_per_hour"] == pytest.approx(10, rel=1e-6)
    assert serve_load.slope([(0.0, 1.0), (1.0, 1.0)]) is None


def load_with(*records):
    return Load("", 1, {}, 1, records=list(records))


def test_the_longest_gap_is_between_right_images():
    records = [Record(t, 0.1, 200) for t in (1.0, 2.0, 2.5, 6.0)] + [Record(4.0, 0.1, 200, wrong=True)]
    found = serve_trial.outcome(load_with(*records, Record(4.5, 0.1, 503)), fault_s=2.2)
    assert found["longest_gap_s"] == 3.5
    assert found["wrong_answers"] == 1


GOOD = {"statuses": {"200": 5}, "wrong_answers": 0, "exit": 0}


@pytest.mark.parametrize(
    ("name", "change", "bad"),
    [
        ("worker killed", {}, False),
        ("worker killed", {"wrong_answers": 1}, True),
        ("worker killed", {"statuses": {"0": 1, "200": 5}}, True),
        ("worker killed", {"exit": -9}, True),
        ("front killed", {"statuses": {"0": 1, "200": 5}}, False),
        ("front killed", {"statuses": {"200": 5, "500": 1}}, True),
        ("worker hangs", {"statuses": {"200": 5, "504": 1}}, False),
        ("bad requests", {"answers": {"no JSON": "HTTP/1.1 400 Bad Request", "silent": "hung up on"}}, False),
        ("bad requests", {"answers": {"no JSON": "HTTP/1.1 200 OK"}}, True),
    ],
)
def test_what_counts_as_a_failure(name, change, bad):
    assert bool(serve_faults.verdict(name, {**GOOD, **change})) is bad


def test_a_damaged_bundle_that_is_served_is_a_failure():
    refused = {"exit": 2, "traceback": False, "says": ["error"]}
    assert not serve_faults.verdict("bundle damaged at the start", {"workers": refused, "load_average": 1.0})
    assert serve_faults.verdict("bundle damaged at the start", {"workers": {**refused, "exit": 0}})
    assert serve_faults.verdict("bundle damaged at the start", {"workers": {**refused, "traceback": True}})
