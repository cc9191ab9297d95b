"""`qexport serve --ray`: replicas on a Ray cluster of this machine. Skipped where Ray is not installed."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import httpx2
import numpy as np
import pytest
from service_process import COMMAND, WAIT_S, Process

from qexport.runtime import load
from qexport.runtime.pixels import to_pixels

LOAD_S = 6.0
CLIENTS = 4

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def descendants(root):
    """Title by number of the processes that came from one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, added = {root}, {root}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added} - found
        found |= added
    titles = {}
    for pid in found:
        try:
            titles[pid] = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
    return titles


def figure(it, name):
    text = httpx2.get(f"{it.url}/metrics", timeout=WAIT_S).text
    return float(re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M)[1])


@pytest.fixture(scope="module")
def on_ray(toy, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("ray")
    options = ("--ray", "--replicas", "2", "--buckets", "4", "--linger-ms", "0")
    it = Process(toy, *options, temporary=temporary, strict=False)
    yield it.until_ready()
    it.clear_away()


@needs_ray
@pytest.mark.slow
def test_the_same_bytes_as_offline_and_replicas_may_be_killed(on_ray, toy):
    it = on_ray
    offline = load(toy, provider="cpu", threads=1)
    seeds = range(CLIENTS)
    want = {seed: to_pixels(offline.generate([1] * 4, seed=seed, batch=4))[:1] for seed in seeds}
    replicas = [pid for pid, title in descendants(it.process.pid).items() if title.startswith("ray::ServeReplica")]
    assert len(replicas) == 2
    statuses, wrong = [], []
    end_s = time.monotonic() + LOAD_S

    def client(seed):
        with httpx2.Client(timeout=WAIT_S) as http:
            while time.monotonic() < end_s:
                body = {"labels": [1], "seed": seed, "format": "npz"}
                answer = http.post(f"{it.url}/v1/images", json=body)
                statuses.append(answer.status_code)
                if answer.status_code == 200:
                    images = np.load(io.BytesIO(answer.content))["images"]
                    if (images != want[seed]).any():
                        wrong.append(seed)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    os.kill(replicas[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(statuses) == {200}
    assert len(statuses) > CLIENTS
    assert httpx2.get(f"{it.url}/readyz", timeout=WAIT_S).status_code == 200
    deadline_s = time.monotonic() + WAIT_S

    def alive():
        return [pid for pid, title in descendants(it.process.pid).items() if title.startswith("ray::ServeReplica")]

    while len(set(alive()) - {replicas[0]}) < 2:  # Ray Serve replaces it
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


@needs_ray
@pytest.mark.slow
def test_it_ends_as_it_does_without_ray_and_leaves_no_process(on_ray):
    family = descendants(on_ray.process.pid)
    assert len(family) > 3
    assert on_ray.end() == 0
    deadline_s = time.monotonic() + WAIT_S
    while any((Path("/proc") / str(pid)).exists() for pid in family):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


@needs_ray
@pytest.mark.slow
def test_more_cores_than_the_machine_has_are_refused(toy):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "serve", str(toy), "--port", "0", "--ray", "--replicas", "9999"],
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
    )
    assert done.returncode == 2
    assert "9999 replicas need 9999 cores" in done.stderr


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(toy):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "serve", str(toy), "--port", "0", "--ray"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "pip install 'qexport[ray]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--ray", "--workers", "2"), "exclude each other"), (("--replicas", "2"), "needs --ray")],
)
def test_options_that_contradict_each_other(toy, options, says):
    command = [sys.executable, "-c", COMMAND, "serve", str(toy), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]
