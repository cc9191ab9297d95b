"""`qexport serve`: what keeps it from starting is one line and exit code 2. Running it: tests/qexport/serve."""

from __future__ import annotations

import shutil
import socket

import pytest


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--buckets", "1,2"], "at least 2"),
        (["--buckets", "two"], "batch sizes"),
        (["--queue", "0"], "queue_images"),
        (["--deadline", "0"], "deadline_s"),
        (["--port", "70000"], "--port"),
        (["--host", "203.0.113.1"], "cannot listen"),
        (["--provider", "tpu"], "tpu"),
    ],
)
def test_wrong_options(spawn, toy, arguments, says):
    outcome = spawn("serve", toy, "--port", "0", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_a_port_in_use(spawn, toy):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = spawn("serve", toy, "--port", taken.getsockname()[1])
    assert outcome.code == 2
    assert "choose another --port" in outcome.error


@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_a_damaged_bundle_is_not_served(spawn, toy, tmp_path, damage):
    bundle = tmp_path / "bundle"
    shutil.copytree(toy, bundle)
    weights = bundle / "weights.data"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "altered" else data[:-1])
    outcome = spawn("serve", bundle, "--port", "0")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: {weights}: {damage}")


def test_no_bundle(spawn, toy, tmp_path):
    missing = spawn("serve", tmp_path / "missing", "--port", "0")
    assert missing.code == 2
    assert missing.error.startswith(f"error: {tmp_path / 'missing'}: no such folder")
    outcome = spawn("serve", toy, toy, "--port", "0")
    assert outcome.code == 2
    assert "different names" in outcome.err.splitlines()[-1]


def test_no_room_for_the_copy(spawn, var, mounted):
    folder = mounted("size=64k")
    outcome = spawn("serve", var, "--port", "0", TMPDIR=str(folder))
    assert outcome.code == 2
    assert "no space left" in outcome.err.splitlines()[-1]
    assert not [*folder.glob("qexport*")]


def test_without_the_packages_it_says_which_to_install(spawn, toy):
    outcome = spawn("serve", toy, before="import sys; sys.modules['fastapi'] = None")
    assert outcome.code == 2
    assert "pip install 'qexport[serve]'" in outcome.error
