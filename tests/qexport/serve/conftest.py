"""What the tests of the service share: the hand-made bundle, and an application around it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from service_process import Process

sys.path.insert(0, str(Path(__file__).parents[1]))  # the hand-made bundle lies there


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """The bundle that can be worked out by hand."""
    import toy_bundle

    path = tmp_path_factory.mktemp("serve") / "toy"
    toy_bundle.write(path)
    return path


@pytest.fixture
def post():
    """POST a request for images; the answer of the test client."""

    def send(client, body=None, /, **fields):
        content = body if body is not None else json.dumps({"labels": [0], **fields})
        return client.post("/v1/images", content=content, headers={"content-type": "application/json"})

    return send


@pytest.fixture
def start(tmp_path):
    """Start `qexport serve` with arguments and wait until it is ready."""
    started = []
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def starter(*arguments):
        started.append(Process(*arguments, temporary=temporary))
        return started[-1].until_ready()

    yield starter
    for one in started:
        one.clear_away()
