"""What an operator fears: processes killed under load, a full disk, and files that change behind the service's back."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from service_process import COMMAND, WAIT_S, Process

CLIENTS = 4


def ended(pid):
    """Whether a process is gone, or only waits to be collected."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def copies(folder):
    return [*folder.glob("qexport-serve-*")]  # ONNX Runtime keeps a file of its own there


def until(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def figure(it, name):
    text = httpx2.get(f"{it.url}/metrics", timeout=WAIT_S).text
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


@pytest.fixture
def with_workers(toy, tmp_path):
    """A service with two workers whose log comes in order, and its workers' numbers."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    it = Process(toy, "--workers", "2", "--buckets", "4", "--linger-ms", "0", temporary=temporary)
    it.port = it.wait_for("listening")["port"]
    it.url = f"http://127.0.0.1:{it.port}"
    pids = it.workers(2)
    until(lambda: figure(it, "qexport_drawers_ready") == 2)
    yield it, pids
    it.clear_away()


def test_workers_killed_under_load_cost_no_request_and_no_wrong_image(with_workers):
    it, pids = with_workers
    want = {seed: it.draw(seed=seed) for seed in range(CLIENTS)}
    statuses, wrong = [], []
    enough = threading.Event()

    def client(seed):
        with httpx2.Client(timeout=WAIT_S) as http:
            while not enough.is_set():
                answer = http.post(f"{it.url}/v1/images", json={"labels": [1], "seed": seed})
                statuses.append(answer.status_code)
                if answer.content != want[seed]:
                    wrong.append((seed, answer.status_code))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for lost, pid in enumerate(pids, start=1):
            until(lambda lost=lost: len(statuses) > 4 * lost)  # in the middle of the load
            os.kill(pid, signal.SIGKILL)
            until(lambda lost=lost: figure(it, "qexport_lost_drawers_total") == lost)
            until(lambda: figure(it, "qexport_drawers_ready") == 2)
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert set(statuses) == {200}
    assert httpx2.get(f"{it.url}/readyz").status_code == 200
    assert it.end() == 0


def test_a_service_that_is_killed_leaves_no_process_and_the_next_one_cleans_up(with_workers, toy):
    it, pids = with_workers
    assert it.end(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: all(map(ended, pids)))
    (left,) = copies(it.temporary)
    again = Process(toy, "--workers", "1", temporary=it.temporary)
    try:
        again.until_ready()
        assert not left.exists()
        assert "removed" in {event["event"] for event in again.events}
        assert again.end() == 0
        assert not copies(it.temporary)
    finally:
        again.clear_away()


def test_ctrl_c_reaches_all_processes_and_still_nothing_is_lost(toy, tmp_path):
    """A terminal signals the whole group; workers that died of it would take their batches along."""
    it = Process(toy, "--workers", "1", "--linger-ms", "1500", "--buckets", "8", temporary=tmp_path, group=True)
    try:
        it.until_ready()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(it.draw(seed=1)))
        asking.start()
        until(lambda: figure(it, 'qexport_queue_images{bundle="toy"}') == 1)
        os.killpg(it.process.pid, signal.SIGINT)
        asking.join(WAIT_S)
        assert len(answers) == 1
        assert it.process.wait(WAIT_S) == 0
        assert it.wait_for("stopped")["drained"]
    finally:
        it.clear_away()


def test_a_worker_that_cannot_start_again_is_no_end_of_the_service(with_workers):
    """The copy that workers load is damaged: the one that lives goes on, the other refuses to draw from such bytes."""
    it, pids = with_workers
    want = it.draw(seed=7)
    (weights,) = it.temporary.glob("qexport-serve-*/bundle/weights.data")
    damaged = weights.with_name("damaged")
    damaged.write_bytes(b"\xff" * weights.stat().st_size)
    damaged.replace(weights)  # another file of that name: what is mapped already stays as it is
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(20):
        assert it.draw(seed=7) == want
    assert "weights.data" in it.wait_for("warm-up failed")["why"]
    assert figure(it, "qexport_drawers_ready") == 1
    assert httpx2.get(f"{it.url}/readyz").status_code == 200


@pytest.mark.parametrize("workers", [(), ("--workers", "1")], ids=["one process", "workers"])
def test_no_room_for_the_copy_is_one_line_and_leaves_nothing(toy, tmp_path, workers):
    """Files may not grow beyond 64 bytes, which stands for a full disk (no mount is needed for it)."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    command = [sys.executable, "-c", COMMAND, "serve", str(toy), "--port", "0", *workers]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=WAIT_S)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr.splitlines()[-1]
    assert "disk" in done.stderr.splitlines()[-1]
    assert not copies(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")  # noqa: PTH110
def test_a_log_on_a_full_disk_stops_nothing(toy, tmp_path):
    from socket import socket

    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", COMMAND, "serve", str(toy), "--port", str(port), "--threads", "1"]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = subprocess.Popen(command, stderr=full, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        url = f"http://127.0.0.1:{port}"

        def ready():
            with contextlib.suppress(httpx2.HTTPError):
                return httpx2.get(f"{url}/readyz").status_code == 200

        until(ready)
        bodies = [{"labels": [1], "seed": seed} for seed in (1, 2, 1)]
        answers = [httpx2.post(f"{url}/v1/images", json=body, timeout=WAIT_S) for body in bodies]
        assert [answer.status_code for answer in answers] == [200] * 3
        assert answers[0].content == answers[2].content != answers[1].content
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


def test_a_bundle_that_was_damaged_before_the_start_is_refused(toy, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(toy, bundle)
    with (bundle / "weights.data").open("r+b") as file:
        file.write(b"\xff")
    command = [sys.executable, "-c", COMMAND, "serve", str(bundle), "--port", "0", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 2
    assert str(bundle / "weights.data") in done.stderr.splitlines()[-1]
