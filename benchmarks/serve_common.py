"""What the measurements of `qexport serve` share: the service as a process, images drawn offline, and a load.

A client is closed-loop: it asks for one image, waits for it, and asks again; client k always wants class k mod classes
of seed k. The offline images are drawn by the runtime itself in each bucket, so an answer is right if its pixels have
the hash of the bucket that its header names.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from qexport.runtime import Runtime
from qexport.runtime.pixels import to_pixels

SERVE = (sys.executable, "-c", "from qexport_cli.main import main; main()", "serve")
"""The command, whatever is on the path."""
SHIFT = 1e-3
TIMEOUT_S = 120.0
START_S = 300.0
UNREACHABLE = 0
"""In place of a status: no answer, as the connection was refused or cut."""
PAUSE_S = 0.05
"""Before a client that was refused or cut asks again."""


def request(k: int, classes: int, apart: bool, cfg: float) -> dict[str, Any]:
    """What client k asks for."""
    settings = {"settings": {"cfg": cfg + SHIFT * k}} if apart else {}
    return {"labels": [k % classes], "seed": k, "format": "npz", **settings}


def hash_of(pixels_HWC: np.ndarray) -> str:
    """Name of an image by its pixels."""
    return hashlib.sha256(np.ascontiguousarray(pixels_HWC).tobytes()).hexdigest()


def offline(
    runtime: Runtime, clients: int, buckets: Sequence[int], apart: bool = False, cfg: float = 0.0
) -> dict[tuple[int, int], str]:
    """Hash by (client, bucket) of the image that the runtime draws by itself."""
    classes = runtime.bundle.manifest.model.num_classes
    found = {}
    for bucket in buckets:
        for start in range(0, clients, 1 if apart else bucket):
            rows = [start] if apart else list(range(start, min(start + bucket, clients)))
            padded = rows + [rows[-1]] * (bucket - len(rows))
            given: dict[str, Any] = {"label": [k % classes for k in padded]}
            if apart:
                given["cfg"] = np.float32(cfg + SHIFT * start)
            images = runtime.player.play(given, images=[(k, 0) for k in padded])
            for k, pixels in zip(rows, to_pixels(images), strict=False):
                found[k, bucket] = hash_of(pixels)
    return found


class Service:
    """`qexport serve` on a free port, with its log."""

    def __init__(self, bundle: Path, *options: str, threads: int = 1, environment: Mapping[str, str] | None = None):
        command = [*SERVE, str(bundle), "--port", "0", "--threads", str(threads), *options]
        self.begun_s = time.monotonic()
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        self.events: list[tuple[float, dict[str, Any]]] = []
        """When it was read, and what: everything but the lines about requests."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Service:
        event = self.wait("listening")
        self.url = f"http://127.0.0.1:{event['port']}"
        self.wait("ready")
        self.ready_s = time.monotonic() - self.begun_s
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{") and '"event": "request"' not in line:  # Ray adds lines of its own
                self.events.append((time.monotonic(), json.loads(line)))

    def named(self, event: str) -> list[dict[str, Any]]:
        """Events of a name so far."""
        return [found for _, found in self.events if found["event"] == event]

    def wait(self, event: str, count: int = 1) -> dict[str, Any]:
        """The event of a name, number `count` of them."""
        end_s = time.monotonic() + START_S
        while len(found := self.named(event)) < count:
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise SystemExit(f"the service gave no {event!r}: {[e for _, e in self.events][-5:]}")
            time.sleep(0.01)
        return found[count - 1]

    def kill_worker(self, sent: int = signal.SIGKILL) -> None:
        """Send a signal to the worker that was started first."""
        os.kill(self.named("worker started")[0]["pid"], sent)

    def figure(self, name: str) -> float:
        """One of the service's own figures, summed over its labels."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=TIMEOUT_S).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def resident_mb(self) -> float:
        """Resident memory of the service and its children; what they share counts in each."""
        kilobytes = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            except OSError:
                continue
            if self.process.pid in (int(fields["Pid"]), int(fields["PPid"])):
                kilobytes += int(fields.get("VmRSS", "0 kB").split()[0])
        return round(kilobytes * 1024 / 1e6, 1)

    def end(self) -> tuple[int, float]:
        """Exit code, and the seconds that it took."""
        start_s = time.monotonic()
        self.process.terminate()
        return self.process.wait(90), round(time.monotonic() - start_s, 2)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.exit_code, self.drain_s = self.end()
        self._reader.join(10)


@dataclass
class Record:
    """What came back: `at_s` (end) on the clock of `time.monotonic`, `wrong` if the image was not the offline one."""

    at_s: float
    latency_s: float
    status: int
    bucket: int = 0
    wrong: bool = False


@dataclass
class Load:
    """`clients` closed-loop clients on `url`, until `over` says so."""

    url: str
    clients: int
    references: Mapping[tuple[int, int], str]
    classes: int
    apart: bool = False
    cfg: float = 0.0
    records: list[Record] = field(default_factory=list)

    def run(self, over: Callable[[], bool]) -> None:
        """Ask until `over()`; returns when the last answer is there."""
        asyncio.run(self._run(over))

    async def _run(self, over: Callable[[], bool]) -> None:
        limits = httpx2.Limits(max_connections=self.clients, max_keepalive_connections=self.clients)
        async with httpx2.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=limits) as http:
            await asyncio.gather(*(self._client(http, k, over) for k in range(self.clients)))

    async def _client(self, http: httpx2.AsyncClient, k: int, over: Callable[[], bool]) -> None:
        body = request(k, self.classes, self.apart, self.cfg)
        while not over():
            start_s = time.monotonic()
            try:
                answer = await http.post("/v1/images", json=body)
            except httpx2.HTTPError:
                self.records.append(Record(time.monotonic(), time.monotonic() - start_s, UNREACHABLE))
                await asyncio.sleep(PAUSE_S)
                continue
            now_s = time.monotonic()
            record = Record(now_s, now_s - start_s, answer.status_code)
            if answer.status_code == 200:
                record.bucket = int(answer.headers["x-qexport-buckets"])
                pixels = np.load(io.BytesIO(answer.content))["images"][0]
                record.wrong = hash_of(pixels) != self.references[k, record.bucket]
            self.records.append(record)
            if answer.status_code in (429, 503):
                await asyncio.sleep(float(answer.headers.get("retry-after", PAUSE_S)))


def summary(records: Sequence[Record], begin_s: float, end_s: float) -> dict[str, Any]:
    """Rates and latencies of what came back between two moments (latencies of images only)."""
    inside = [r for r in records if begin_s <= r.at_s <= end_s]
    good = [r for r in inside if r.status == 200]
    latencies_ms = sorted(r.latency_s * 1000 for r in good)

    def share(part: float) -> float | None:
        """None where there is no image; JSON has no NaN."""
        return round(latencies_ms[min(len(good) - 1, int(part * len(good)))], 1) if good else None

    return {
        "seconds": round(end_s - begin_s, 1), "images_per_s": round(len(good) / (end_s - begin_s), 3),
        "p50_ms": share(0.5), "p99_ms": share(0.99), "max_ms": share(1.0),
        "statuses": {str(k): n for k, n in sorted(Counter(r.status for r in inside).items())},
        "buckets": {str(k): n for k, n in sorted(Counter(r.bucket for r in good).items())},
        "checked_answers": len(good), "wrong_answers": sum(r.wrong for r in good),
    }  # fmt: skip
