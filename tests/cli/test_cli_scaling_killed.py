"""The real `qexport scaling`, ended by SIGKILL at random moments: in the end it has the rows of one left in peace."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qexport.scaling.store import Store

GRID = ("--models", "var-c10-d2", "--wbits", "2,3,4,6,8,16", "--formats", "int,fp", "--methods", "rtn")
RUNS = 9
IMAGES = 4
KILLING_S = 60
"""For so long it is begun anew and killed; a quiet machine starts it in some seconds, so that is several times."""
MOST_KILLS = 10
STARTED_S = 240


def start(folder: Path, images: Path) -> subprocess.Popen[bytes]:
    """One process on one store, nothing of it drawn by the model: runs take a fraction of a second."""
    code = "from qexport_cli.main import main\nmain()"
    options = ("--images", images, "--samples", IMAGES, "--fd", 0, "--out", folder, "--store", folder / "s.sqlite")
    program = [sys.executable, "-c", code, "scaling", *GRID, *map(str, options)]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=STARTED_S)
    assert process.returncode == 0, err.decode()


def rows(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All of every row that is not about when and where it was made."""
    path = folder / "s.sqlite"
    if not path.exists():
        return {}
    with Store(path) as store:
        return {
            row.key: (
                row.run, row.measured.figures, row.measured.cost, row.settings,
                {name: values.tolist() for name, values in row.measured.per_image.items()},
            )
            for row in store.rows()
        }  # fmt: skip


def claimed(folder: Path) -> set[str]:
    """Keys that somebody took and did not finish; read without a lock and without clearing anything up."""
    path = folder / "s.sqlite"
    if not path.exists():
        return set()
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return {key for (key,) in db.execute("SELECT key FROM claims")}
    except sqlite3.OperationalError:  # it is being made
        return set()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (IMAGES, 32, 32, 3), np.uint8), labels=np.arange(IMAGES))
    return path


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_rows(tmp_path, images):
    peace, war = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(peace, images))
    undisturbed = rows(peace)
    assert len(undisturbed) == RUNS
    with Store(peace / "s.sqlite") as store:
        shortest_s = min(row.wall_s for row in store.rows())  # a kill within it comes before the run's end
    chance = random.Random(11)
    begun, kills, in_flight = time.perf_counter(), 0, 0
    kept: dict[str, tuple[Any, ...]] = {}
    while kills < MOST_KILLS and len(kept) < RUNS and (not kills or time.perf_counter() - begun < KILLING_S):
        stale = claimed(war)
        process = start(war, images)
        # What is not tested is the import of torch, which takes longest: wait until a run is under way.
        while process.poll() is None and not (claimed(war) - stale or set(rows(war)) - set(kept)):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, shortest_s))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        in_flight += bool(claimed(war))
        found = rows(war)
        assert kept.items() <= found.items()  # nothing that was there is gone or has changed
        assert all(undisturbed[key] == row for key, row in found.items())  # and nothing is half there
        kept = found
    assert in_flight, "every kill came between runs or too late; nothing was tested"
    finish(start(war, images))
    assert rows(war) == undisturbed
    assert claimed(war) == set()
    print(f"{kills} kills, {in_flight} with a run in flight")
