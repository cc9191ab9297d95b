"""The service as a process: how it starts, how it ends, and what happens to the files under it while it runs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time

import httpx2
import pytest
from service_process import READ_TIMEOUT_S, WAIT_S


def test_sigterm_ends_well_and_loses_no_request(start, toy):
    it = start(toy, "--linger-ms", "4000", "--buckets", "8")
    answers = []
    asking = [threading.Thread(target=lambda i=i: answers.append(it.draw(seed=i))) for i in range(3)]
    for thread in asking:
        thread.start()
    deadline_s = time.monotonic() + WAIT_S
    while "queue_images" not in (text := httpx2.get(f"{it.url}/metrics").text) or not re.search(
        r'^qexport_queue_images\{bundle="toy"\} 3', text, re.M
    ):
        assert time.monotonic() < deadline_s
    assert it.end() == 0
    for thread in asking:
        thread.join()
    assert len(set(answers)) == 3
    assert it.wait_for("stopped")["drained"]


def test_a_delay_before_it_stops_listening(start, toy):
    it = start(toy, "--drain-delay", "2")
    it.process.send_signal(signal.SIGTERM)
    it.wait_for("draining")
    assert httpx2.get(f"{it.url}/readyz").status_code == 503
    assert it.draw(seed=1)
    assert it.process.wait(WAIT_S) == 0


def test_damage_to_the_files_changes_no_image(start, w4_bundle, tmp_path):
    """Overwritten in place and then truncated: a mapped file would give other images, and then a bus error."""
    bundle = tmp_path / "bundle"
    shutil.copytree(w4_bundle.path, bundle)
    it = start(bundle, "--buckets", "2")
    assert not [*it.temporary.glob("qexport*")]  # the copy has no name any more
    before = it.draw(seed=1)
    weights = bundle / "weights.data"
    with weights.open("r+b") as file:
        file.write(os.urandom(weights.stat().st_size))
    assert it.draw(seed=1) == before
    os.truncate(weights, 10)
    assert it.draw(seed=1) == before
    (bundle / "manifest.json").unlink()
    assert it.draw(seed=1) == before
    assert it.draw(seed=2) != before


def test_after_a_kill_the_next_one_answers_the_same(start, toy):
    first = start(toy)
    before = first.draw(seed=5)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    assert start(toy).draw(seed=5) == before


def test_slow_clients_are_hung_up_on_and_others_served(start, toy):
    it = start(toy)
    header = b"POST /v1/images HTTP/1.1\r\nHost: x\r\n"
    silent, half, body, trickle = (it.connect() for _ in range(4))
    half.sendall(header)
    body.sendall(header + b"Content-Length: 15\r\n\r\n{")
    with contextlib.suppress(OSError):  # reset or broken pipe, as the system has it
        for sent in range(400):
            trickle.sendall(header[sent % len(header) :][:1])
            time.sleep(0.05)
    assert sent < 10 * READ_TIMEOUT_S / 0.05  # a byte now and then does not keep it open
    assert it.draw(seed=1)
    assert silent.recv(1000) == b""
    assert half.recv(1000) == b""
    assert body.recv(1000).startswith(b"HTTP/1.1 408")
    for connection in (silent, half, body, trickle):
        connection.close()


@pytest.mark.parametrize(
    "sent",
    [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTQ/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000],
    ids=["bytes", "no path", "protocol", "headers without end"],
)
def test_what_is_not_http_harms_nobody(start, toy, sent):
    it = start(toy)
    with it.connect() as connection:
        connection.sendall(sent)
        assert connection.recv(1000).startswith(b"HTTP/1.1 4")
    assert it.draw(seed=1)


def test_a_second_request_on_the_same_connection(start, toy):
    it = start(toy)
    with httpx2.Client(base_url=it.url, timeout=WAIT_S) as client:
        for seed in range(3):
            time.sleep(READ_TIMEOUT_S / 2)  # idle between requests is no slowness
            assert client.post("/v1/images", json={"labels": [1], "seed": seed}).status_code == 200


def test_who_leaves_gives_the_place_back(start, toy):
    it = start(toy, "--linger-ms", "2000", "--buckets", "4")
    body = b'{"labels": [1]}'
    with it.connect() as connection:
        connection.sendall(b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.5)  # in the queue, waiting for company
    assert it.draw(seed=1)
    text = httpx2.get(f"{it.url}/metrics").text
    assert re.search(r'^qexport_dropped_images_total\{bundle="toy"\} 1', text, re.M)
    assert re.search(r'^qexport_images_total\{bundle="toy"\} 1', text, re.M)
    assert re.search(r'^qexport_requests_total\{path="/v1/images",status="499"\} 1', text, re.M)
