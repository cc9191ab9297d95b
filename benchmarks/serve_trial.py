"""What all faults of `serve_faults` share: a service under load, a moment at which it is hurt, and what clients saw.

    with bench.service("--workers", "2", ready=2) as service, bench.clients(service.url) as fault:
        service.kill_worker()
        workers_again(service, lost=1, ready=2)
        fault.recovered()
    {**fault.found(), "exit": service.exit_code}

Clients ask from `BEFORE_S` before the body to `AFTER_S` after it. A service that must refuse to start has no clients:
`refusals` runs it to its end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_common import SERVE, Load, Service, offline, summary

from qexport.bundle import Bundle
from qexport.runtime import load
from qexport.serve import ServeSettings

CLIENTS = 8
BEFORE_S = 3.0
AFTER_S = 3.0
RECOVERY_S = 120.0
MUTE_S = 0.1
"""Answers that come so soon after the fault were on their way before it."""
STARTS: Mapping[str, tuple[str, ...]] = {"one process": (), "workers": ("--workers", "1")}
"""Both ways to start a service, as they are called in the results."""


@dataclass
class Fault:
    """What the clients of a service saw of what happened to it at `at_s` (`time.monotonic`)."""

    load: Load
    at_s: float
    recovery_s: float | None = None

    def image_again(self) -> None:
        """Recovered at the next right image."""
        until(lambda: any(r.status == 200 and r.at_s > self.at_s + MUTE_S for r in self.load.records))
        self.recovered()

    def recovered(self) -> None:
        """Recovered now."""
        self.recovery_s = round(time.monotonic() - self.at_s, 2)

    def found(self) -> dict[str, Any]:
        """See `outcome`; and the time to recover, where the body said when."""
        recovery = {} if self.recovery_s is None else {"recovery_s": self.recovery_s}
        return {**outcome(self.load, self.at_s), **recovery}


class Bench:
    """The bundle, and what its images are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bundle = Bundle.open(path)
        self.classes = self.bundle.manifest.model.num_classes
        runtime = load(path, provider="cpu", threads=1)
        self.references = offline(runtime, CLIENTS, ServeSettings().buckets)

    @contextlib.contextmanager
    def service(
        self, *options: str, ready: int = 1, environment: Mapping[str, str] | None = None, path: Path | None = None
    ) -> Iterator[Service]:
        """`qexport serve` of the bundle, or of a copy of it at `path`; begins when `ready` of its workers are."""
        with Service(path or self.path, *options, environment=environment) as service:
            service.wait("ready", ready)
            yield service

    @contextlib.contextmanager
    def load(self, url: str, clients: int = CLIENTS) -> Iterator[Load]:
        """Clients that ask as long as the context lasts."""
        one, over = Load(url, clients, self.references, self.classes), threading.Event()
        thread = threading.Thread(target=one.run, args=(over.is_set,))
        thread.start()
        try:
            yield one
        finally:
            over.set()
            thread.join()

    @contextlib.contextmanager
    def clients(self, url: str) -> Iterator[Fault]:
        """Clients before, during and after the body, which does the harm."""
        with self.load(url) as one:
            time.sleep(BEFORE_S)
            yield Fault(one, time.monotonic())
            time.sleep(AFTER_S)


def until(condition: Callable[[], bool], limit_s: float = RECOVERY_S) -> None:
    """Wait until a condition holds; end the measurement where it does not."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > limit_s:
            raise SystemExit(f"not recovered within {limit_s} s")
        time.sleep(0.02)


def workers_again(service: Service, lost: int, ready: int) -> None:
    """Wait until so many workers were found lost and so many are ready."""
    until(lambda: service.figure("qexport_lost_drawers_total") == lost)
    until(lambda: service.figure("qexport_drawers_ready") == ready)


def outcome(one: Load, fault_s: float) -> dict[str, Any]:
    """What the clients saw; the longest time without a right image is counted from the fault on."""
    records = sorted(one.records, key=lambda r: r.at_s)
    right_s = [fault_s, *(r.at_s for r in records if r.at_s > fault_s and r.status == 200 and not r.wrong)]
    found = summary(records, records[0].at_s, records[-1].at_s)
    kept = ("statuses", "checked_answers", "wrong_answers", "max_ms")
    gaps_s = [b - a for a, b in itertools.pairwise(right_s)]
    longest_s = round(max(gaps_s), 2) if gaps_s else None  # None: no right image came any more
    return {**{name: found[name] for name in kept}, "longest_gap_s": longest_s}


@contextlib.contextmanager
def small_disk(size_bytes: int) -> Iterator[tuple[Path, str]]:
    """A folder on a disk of that size, and what kind of disk it is."""
    with tempfile.TemporaryDirectory(prefix="qexport-faults-") as name:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", name]
        mounted = bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            yield Path(name), "tmpfs" if mounted else "limit on the size of files"
        finally:
            if mounted:
                subprocess.run(["umount", "-l", name], check=True)


def refusals(
    bundle: Path,
    folder: Path,
    called: str,
    environment: Mapping[str, str] | None = None,
    limit_bytes: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Start a service that must refuse, in both ways: exit code, last line, and whether it left a traceback.

    Args:
        bundle: what it is to serve.
        folder: whose name the last line may hold; it stands there as `called`.
        called: see `folder`.
        environment: added to ours.
        limit_bytes: most that a file may hold; None sets no limit.
    """

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    found = {}
    for name, options in STARTS.items():
        done = subprocess.run(
            [*SERVE, str(bundle), "--port", "0", *options], capture_output=True, text=True,
            env={**os.environ, **(environment or {})}, preexec_fn=limit, timeout=RECOVERY_S,
        )  # fmt: skip
        says = [line.replace(str(folder), called) for line in done.stderr.splitlines()[-1:]]
        found[name] = {"exit": done.returncode, "traceback": "Traceback" in done.stderr, "says": says}
    return found
