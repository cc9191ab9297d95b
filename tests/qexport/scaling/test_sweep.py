"""Sweeps with a made-up measurement: nothing twice, nothing lost, however often they are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_sweep
import pytest

from qexport.errors import InputError
from qexport.scaling.store import Store
from qexport.scaling.sweep import sweep, threads_for

RUNS = 60
KILLS = 10


def start(tmp_path: Path, jobs: int = 1) -> subprocess.Popen[str]:
    program = [sys.executable, fake_sweep.__file__, tmp_path / "s.sqlite", tmp_path / "log", RUNS, jobs]
    return subprocess.Popen([str(word) for word in program], stdout=subprocess.PIPE, text=True)


def rows(tmp_path: Path) -> dict[str, float]:
    with Store(tmp_path / "s.sqlite") as store:
        return {row.key: row.measured.figures["kl"]["value"] for row in store.rows()}


def calls(tmp_path: Path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = sweep(fake_sweep.task(str(folder / "s.sqlite"), str(folder / "log"), RUNS))
    assert (outcome.made, outcome.found, outcome.complete) == (RUNS, 0, True)
    assert len(calls(folder)) == RUNS
    return rows(folder)


def test_what_is_there_is_not_measured_again(tmp_path, undisturbed):
    arguments = str(tmp_path / "s.sqlite"), str(tmp_path / "log")
    assert sweep(fake_sweep.task(*arguments, 5)).made == 5
    outcome = sweep(fake_sweep.task(*arguments, RUNS))
    assert (outcome.made, outcome.found) == (RUNS - 5, 5)
    assert len(calls(tmp_path)) == RUNS
    assert rows(tmp_path) == undisturbed


def wait_for_calls(tmp_path: Path, process: subprocess.Popen[str], count: int) -> None:
    while len(calls(tmp_path)) < count and process.poll() is None:
        time.sleep(0.002)


def test_killed_ten_times_it_loses_the_runs_in_flight_and_nothing_else(tmp_path, undisturbed):
    chance = random.Random(7)
    kept: dict[str, float] = {}
    for _ in range(KILLS):
        process = start(tmp_path)
        # Killing starts once a run is under way: the moments before are not what is tested, and take longest.
        wait_for_calls(tmp_path, process, len(calls(tmp_path)) + 1)
        time.sleep(chance.uniform(0, 4 * fake_sweep.RUN_S))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = rows(tmp_path)
        assert kept.items() <= found.items()  # nothing that was there is gone or has changed
        kept = found
    assert len(kept) < RUNS, "every kill came too late; nothing was tested"
    last = start(tmp_path)
    out, _ = last.communicate(timeout=60)
    assert last.returncode == 0
    assert out.split() == [str(RUNS - len(kept)), str(len(kept))]
    assert rows(tmp_path) == undisturbed
    assert len(calls(tmp_path)) <= RUNS + KILLS  # one run lost a kill, at most


def test_processes_share_the_runs(tmp_path, undisturbed):
    process = start(tmp_path, jobs=2)
    out, _ = process.communicate(timeout=60)
    assert out.split() == [str(RUNS), "0"]
    assert sorted(calls(tmp_path)) == sorted(undisturbed)  # each once
    assert rows(tmp_path) == undisturbed


def test_children_of_a_killed_sweep_finish_their_run_and_stop(tmp_path, undisturbed):
    first = start(tmp_path, jobs=2)
    wait_for_calls(tmp_path, first, 4)
    first.kill()
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
    second = start(tmp_path, jobs=2)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0, out
    assert rows(tmp_path) == undisturbed
    assert sorted(calls(tmp_path)) == sorted(undisturbed)  # even those in flight were kept


def test_a_run_that_fails_stops_no_other(tmp_path):
    task = fake_sweep.task(str(tmp_path / "s.sqlite"), str(tmp_path / "log"), 2, broken=True)
    outcome = sweep(task)
    assert outcome.made == 2
    assert outcome.failed == {"broken int4 rtn": "this one does not work"}
    assert not outcome.complete
    with Store(tmp_path / "s.sqlite") as store:
        assert store.claims() == {}
    assert sweep(task).failed == outcome.failed  # tried anew


@pytest.mark.parametrize(
    ("asked", "cores", "jobs", "threads"),
    [
        (None, 8, 1, 8),
        (None, 8, 3, 2),
        (None, 2, 4, 1),
        ("1", 8, 1, 1),
        ("3", 8, 8, 3),
        ("4,2", 8, 1, 4),
        ("", 8, 2, 4),
    ],
)
def test_threads_are_what_was_asked_for_or_a_share(monkeypatch, asked, cores, jobs, threads):
    monkeypatch.setattr("qexport.scaling.sweep.usable_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_for(jobs) == threads


def test_no_process_is_too_few(tmp_path):
    with pytest.raises(InputError, match="--jobs 0"):
        sweep(fake_sweep.task(str(tmp_path / "s.sqlite"), str(tmp_path / "log"), 2), jobs=0)
