"""The interface: answers hold the right pixels, and whatever is wrong gets its status and one line."""

from __future__ import annotations

import io
import json
import logging
import re
import threading

import numpy as np
import pytest
import toy_bundle
from PIL import Image
from starlette.testclient import TestClient

from qexport.serve import ServeSettings
from qexport.serve.logs import JsonLines
from qexport.serve.server import build

SETTINGS = ServeSettings(
    buckets=(2, 4), linger_ms=0, max_images=16, queue_images=16, max_body_bytes=2048, deadline_s=30
)


@pytest.fixture(scope="module")
def client(toy, tmp_path_factory):
    other = tmp_path_factory.mktemp("serve") / "other"
    toy_bundle.write(other)
    with TestClient(build([toy, other], SETTINGS, provider="cpu", threads=1)) as client:
        wait_until_ready(client)
        yield client


def wait_until_ready(client):
    for _ in range(2000):
        if client.get("/readyz").status_code == 200:
            return
    raise AssertionError("never ready")


def by_hand(labels, **how):
    return toy_bundle.expected(labels, **how).transpose(0, 2, 3, 1) * 255


# float32 against float64: a value may lie on the other side of a rounding boundary
HALF = 0.5 + 1e-3


def test_png_and_its_headers(client, post):
    answer = post(client, labels=[3], seed=2**64 - 1, first_index=5, settings={"gain": 0.5})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-qexport-bundle"] == "toy"
    assert answer.headers["x-qexport-seed"] == str(2**64 - 1)
    assert answer.headers["x-qexport-buckets"] == "2"
    assert re.fullmatch("[0-9a-f]{64}", answer.headers["x-qexport-digest"])
    with Image.open(io.BytesIO(answer.content)) as image:
        got = np.asarray(image)
    np.testing.assert_allclose(got, by_hand([3], seed=2**64 - 1, first_index=5, gain=0.5)[0], atol=HALF)
    again = post(client, labels=[3], seed=2**64 - 1, first_index=5, settings={"gain": 0.5})
    assert again.content == answer.content
    assert again.headers["x-request-id"] != answer.headers["x-request-id"]


def test_npz_grid_and_jpeg(client, post):
    fields = {"labels": [1, 3], "n": 5, "seed": 9}
    labels = [1, 3, 1, 3, 1]
    answer = post(client, format="npz", **fields)
    data = np.load(io.BytesIO(answer.content))
    np.testing.assert_allclose(data["images"], by_hand(labels, seed=9), atol=HALF)
    np.testing.assert_array_equal(data["labels"], labels)
    grid = post(client, format="grid", **fields)
    with Image.open(io.BytesIO(grid.content)) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 2 + 2, 3 * 2 + 2 * 2, 3)
    np.testing.assert_array_equal(pixels[4:, 4:6], data["images"][4])
    jpeg = post(client, labels=[1], seed=9, format="jpeg")
    assert jpeg.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(jpeg.content)) as image:
        assert (image.format, image.size) == ("JPEG", (2, 2))


def test_the_other_bundle(client, post):
    answer = post(client, bundle="other")
    assert answer.headers["x-qexport-bundle"] == "other"
    assert [bundle["name"] for bundle in client.get("/v1/bundles").json()] == ["toy", "other"]


def test_requests_at_the_same_time(client, post):
    answers = {}

    def ask(i):
        answers[i] = post(client, labels=[i % 4], seed=i).content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, content in answers.items():
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_allclose(np.asarray(image), by_hand([i % 4], seed=i)[0], atol=HALF)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("", 400, "not JSON"),
        ("{", 400, "not JSON"),
        ("[" * 2000, 400, "not JSON"),
        ("\x00\xff", 400, "not JSON"),
        ("[]", 422, "the body"),
        ("null", 422, "the body"),
        ({}, 422, "labels"),
        ({"labels": []}, 422, "labels"),
        ({"labels": [4]}, 422, "0 … 3"),
        ({"labels": [0.5]}, 422, "labels.0"),
        ({"labels": [True]}, 422, "labels.0"),
        ({"labels": ["0"]}, 422, "labels.0"),
        ({"labels": [2**200]}, 422, "label"),
        ({"labels": [0] * 17}, 422, "labels"),
        ({"labels": [0], "n": 17}, 422, "n: "),
        ({"labels": [0], "n": 0}, 422, "n: "),
        ({"labels": [0], "seed": -1}, 422, "seed"),
        ({"labels": [0], "seed": 2**64}, 422, "seed"),
        ({"labels": [0], "first_index": 2**64 - 1}, 422, "first_index"),
        ({"labels": [0], "cfg": 1}, 422, "cfg"),
        ({"labels": [0], "settings": {"gian": 1}}, 422, "gian"),
        ({"labels": [0], "settings": {"label": 1}}, 422, "label"),
        ({"labels": [0], "settings": {"gain": -1}}, 422, "gain"),
        ({"labels": [0], "settings": {"gain": "big"}}, 422, "gain"),
        ('{"labels": [0], "settings": {"gain": NaN}}', 422, "gain"),
        ('{"labels": [0], "settings": {"gain": 1e999}}', 422, "gain"),
        ({"labels": [0], "settings": {"gain": 1e300}}, 422, "fits float32"),
        ({"labels": [0], "bundle": "none"}, 422, "bundle"),
        ({"labels": [0], "schedule": "ddim-25"}, 422, "schedule"),
        ({"labels": [0], "format": "gif"}, 422, "format"),
        ({"labels": [0, 1]}, 422, "grid or npz"),
        ({"labels": [0], "timeout_s": 0}, 422, "timeout_s"),
        ({"labels": [0], "timeout_s": 31}, 422, "timeout_s"),
        (" " * 3000, 413, "2048 bytes"),
    ],
)
def test_wrong_requests(client, post, body, status, says):
    answer = post(client, body if isinstance(body, str) else json.dumps(body))
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert says in message
    assert "\n" not in message
    assert len(message) < 300


def test_a_body_without_a_length_is_limited_too(client):
    answer = client.post("/v1/images", content=(b" " * 500 for _ in range(10)))
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


def test_wrong_paths_and_methods(client):
    assert client.get("/v2/images").status_code == 404
    assert client.get("/v1/images").status_code == 405
    assert client.get("/v2/images").json()["error"]["code"] == "http"


@pytest.fixture
def held(toy):
    """A service of its own whose engine stands still from its first batch until the event is set."""
    started, go_on = threading.Event(), threading.Event()
    settings = ServeSettings(buckets=(2,), linger_ms=0, max_images=4, queue_images=4, deadline_s=30)
    app = build([toy], settings, provider="cpu", threads=1)
    with TestClient(app) as client:
        wait_until_ready(client)
        (engine,) = app.state.engines
        (drawer,) = engine._drawers
        play = drawer._play
        drawer._play = lambda batch: (started.set(), go_on.wait(30), play(batch))[-1]
        yield client, started, go_on
        go_on.set()


def in_background(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_a_full_queue_is_429_and_a_late_answer_504(held, post):
    client, started, go_on = held
    statuses = []
    ask = lambda n: lambda: statuses.append(post(client, labels=[0] * n, format="npz").status_code)  # noqa: E731
    one = in_background(ask(1))
    assert started.wait(30)
    answer = post(client, labels=[0], timeout_s=0.05)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    rest = in_background(ask(4), ask(4))  # the late one has left the queue, so that one of them has room
    for thread in rest:
        thread.join(1)
    assert statuses == [429]
    go_on.set()
    for thread in (*one, *rest):
        thread.join()
    assert sorted(statuses) == [200, 200, 429]


def test_retry_after_is_a_header(held, post):
    client, started, go_on = held
    waiting = in_background(lambda: post(client))
    assert started.wait(30)
    waiting += in_background(lambda: post(client, labels=[0] * 4, format="npz"))
    waiting[-1].join(0.5)
    answer = post(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    go_on.set()
    for thread in waiting:
        thread.join()


def test_a_dead_thread_is_seen(toy):
    app = build([toy], SETTINGS, provider="cpu", threads=1)
    with TestClient(app) as client:
        wait_until_ready(client)
        assert client.get("/healthz").json() == {"alive": True, "dead": []}
        app.state.engines[0].stop(30)
        assert client.get("/healthz").status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/images", content='{"labels": [0]}').status_code == 503


def test_figures(client, post):
    def value(text, sample):
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0

    before = client.get("/metrics").text
    post(client, labels=[0, 1, 2], format="npz")
    post(client, labels=[9])
    client.get("/nobody/knows/this")
    after = client.get("/metrics")
    assert after.headers["content-type"].startswith("text/plain")
    for sample, more in {
        'qexport_images_total{bundle="toy"}': 3,
        'qexport_padding_images_total{bundle="toy"}': 1,
        'qexport_requests_total{path="/v1/images",status="422"}': 1,
        'qexport_requests_total{path="other",status="404"}': 1,
        'qexport_batch_seconds_count{bucket="4",bundle="toy"}': 1,
    }.items():
        assert value(after.text, sample) - value(before, sample) == more, sample
    assert value(after.text, 'qexport_queue_images{bundle="toy"}') == 0


def test_the_log_of_a_request(client, post):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(JsonLines().format(record)))
    logger = logging.getLogger("qexport.serve")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        answer = post(client, labels=[1], seed=3)
        client.get("/a%0Ab")  # a path with a line break must not break the line
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    line = next(line for line in lines if line["path"] == "/v1/images")
    assert line["id"] == answer.headers["x-request-id"]
    expected = {"event": "request", "status": 200, "bundle": "toy", "n": 1, "seed": 3, "buckets": "2"}
    assert {key: line[key] for key in expected} == expected
    assert line["queued_ms"] <= line["ms"]


def test_openapi_says_what_the_bundle_takes(client):
    spec = client.get("/openapi.json").json()
    operation = spec["paths"]["/v1/images"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["labels"]
    assert "$ref" not in json.dumps(schema)
    settings = next(option for option in schema["properties"]["settings"]["anyOf"] if "properties" in option)
    assert set(settings["properties"]) == {"gain", "shift"}
    assert {"200", "400", "413", "422", "429", "504"} <= operation["responses"].keys()


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(client, path):
    answer = client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", answer.text)
