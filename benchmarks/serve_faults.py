"""`qexport serve` while things go wrong, every answer checked against the image drawn offline (see serve_trial).

    python benchmarks/serve_faults.py BUNDLE --out benchmarks/results/serve_faults.json

Each fault has a service of its own and, unless it refuses to start, closed-loop clients before, during and after it.
Written down: answers by status (0: no answer at all), wrong images, the longest time without a right one, and the time
to recover:

- worker killed: `kill -9` of one of two workers; recovered when both draw again
- all workers killed: both at once; recovered at the next right image
- worker hangs: one of two is stopped (SIGSTOP); recovered when it was found, killed and replaced
- front killed: `kill -9` of the front, workers and all; recovered when the next service draws its first image
- one process killed: the same without workers
- replica killed: `kill -9` of a Ray Serve replica, where Ray is installed
- disk full at the start, and under a running service whose worker is killed then (a tmpfs where one can be mounted,
  else a limit on the size of files); a log that cannot be written
- bundle damaged at the start; overwritten, cut and removed under a running service whose worker is killed then
- requests that are slow, huge, endless, or no HTTP, while others are served
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import onnxruntime
from serve_common import SERVE
from serve_trial import AFTER_S, BEFORE_S, CLIENTS, Bench, outcome, refusals, small_disk, until, workers_again

DEADLINE_S = 5
"""Of the service whose worker hangs; `engine.HUNG_S` later it is found out."""


def worker_killed(bench: Bench) -> dict[str, Any]:
    with bench.service("--workers", "2", ready=2) as service:
        with bench.clients(service.url) as fault:
            service.kill_worker()
            workers_again(service, lost=1, ready=2)
            fault.recovered()
        redrawn = service.figure("qexport_redrawn_images_total")
    return {**fault.found(), "redrawn_images": redrawn, "exit": service.exit_code}


def all_workers_killed(bench: Bench) -> dict[str, Any]:
    with bench.service("--workers", "2", ready=2) as service, bench.clients(service.url) as fault:
        for started in service.named("worker started"):
            os.kill(started["pid"], signal.SIGKILL)
        fault.image_again()
        workers_again(service, lost=2, ready=2)
    return {**fault.found(), "exit": service.exit_code}


def worker_hangs(bench: Bench) -> dict[str, Any]:
    late = ("--deadline", str(DEADLINE_S))
    with bench.service("--workers", "2", *late, ready=2) as service, bench.clients(service.url) as fault:
        service.kill_worker(signal.SIGSTOP)
        workers_again(service, lost=1, ready=2)
        fault.recovered()
    return {**fault.found(), "deadline_s": DEADLINE_S, "exit": service.exit_code}


def killed_and_started_again(bench: Bench, *options: str) -> dict[str, Any]:
    """Clients go on asking at the same address; a supervisor that starts at once is played by us."""
    with tempfile.TemporaryDirectory(prefix="qexport-faults-") as temporary:
        environment = {"TMPDIR": temporary}

        def copies() -> int:
            return len([*Path(temporary).glob("qexport-serve-*")])

        with bench.service(*options, environment=environment) as first, contextlib.ExitStack() as next_one:
            port = first.url.rpartition(":")[2]
            with bench.clients(first.url) as fault:
                first.process.kill()
                first.process.wait()
                second = next_one.enter_context(bench.service(*options, "--port", port, environment=environment))
                fault.image_again()
            running = copies()
        left = copies()
    return {**fault.found(), "copies_while_running": running, "copies_left": left, "exit": second.exit_code}


def replica_killed(bench: Bench) -> dict[str, Any]:
    if find_spec("ray") is None:
        return {"skipped": "Ray is not installed here"}
    title = f"ray::ServeReplica:qexport-{platform.node()}-{bench.path.resolve().name}".encode()

    def replicas() -> set[int]:
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "cmdline").read_bytes().startswith(title):
                    found.add(int(folder.name))
        return found

    with bench.service("--ray", "--replicas", "2", ready=2) as service:
        before = replicas()
        with bench.clients(service.url) as fault:
            os.kill(min(before), signal.SIGKILL)
            until(lambda: len(replicas() - {min(before)}) == 2)
            fault.recovered()
            time.sleep(AFTER_S)
        lost = service.figure("qexport_lost_drawers_total")
    import ray  # type: ignore[import-not-found]

    found = fault.found()
    found["replica_started_s"] = found.pop("recovery_s")
    return {**found, "lost_batches": lost, "ray": ray.__version__, "exit": service.exit_code}


def disk_full_at_start(bench: Bench) -> dict[str, Any]:
    size_bytes = bench.bundle.size_bytes
    with small_disk(size_bytes // 2) as (folder, kind):
        limit = None if kind == "tmpfs" else size_bytes // 4
        found = refusals(bench.path, folder, "TMPDIR", {"TMPDIR": str(folder)}, limit)
        left = len([*folder.glob("qexport-serve-*")])
    return {name: {**one, "disk": kind, "copies_left": left} for name, one in found.items()}


def disk_full_while_serving(bench: Bench) -> dict[str, Any]:
    with small_disk(2 * bench.bundle.size_bytes + (1 << 20)) as (folder, kind):
        if kind != "tmpfs":
            return {"skipped": "no tmpfs can be mounted here"}
        environment = {"TMPDIR": str(folder)}
        with (
            bench.service("--workers", "2", ready=2, environment=environment) as service,
            bench.clients(service.url) as fault,
        ):
            with contextlib.suppress(OSError), (folder / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(1 << 16))
                    filler.flush()
            free_bytes = shutil.disk_usage(folder).free
            service.kill_worker()
            workers_again(service, lost=1, ready=2)
            fault.recovered()
    return {**fault.found(), "free_bytes": free_bytes, "exit": service.exit_code}


def log_cannot_be_written(bench: Bench) -> dict[str, Any]:
    """stderr is /dev/full, where every write fails for want of space."""
    if not Path("/dev/full").exists():
        return {"skipped": "no /dev/full here"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [*SERVE, str(bench.path), "--threads", "1", "--port", str(port)]
        process = subprocess.Popen(command, stderr=full)

    def ready() -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"{url}/readyz").status_code == 200
        return False

    try:
        until(ready)
        with bench.load(url) as one:
            time.sleep(BEFORE_S + AFTER_S)
    finally:
        process.terminate()
        exit_code = process.wait(60)
    return {**outcome(one, one.records[0].at_s), "exit": exit_code}


def damaged_at_start(bench: Bench) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qexport-faults-") as name:
        bundle = Path(name) / "bundle"
        shutil.copytree(bench.path, bundle)
        weights = bundle / "weights.data"
        with weights.open("r+b") as file:
            file.seek(weights.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        return refusals(bundle, Path(name), "FOLDER")


def damaged_while_serving(bench: Bench, *options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qexport-faults-") as name:
        bundle = Path(name) / bench.path.resolve().name
        shutil.copytree(bench.path, bundle)
        weights = bundle / "weights.data"
        with bench.service(*options, path=bundle) as service, bench.clients(service.url) as fault:
            with weights.open("r+b") as file:
                file.write(os.urandom(weights.stat().st_size))
            time.sleep(1)
            os.truncate(weights, 10)
            time.sleep(1)
            shutil.rmtree(bundle)
            if options:
                service.kill_worker()
                workers_again(service, lost=1, ready=1)
        return {**fault.found(), "exit": service.exit_code}


def bad_requests(bench: Bench) -> dict[str, Any]:
    """Slow, huge, endless and wrong requests beside good ones; first lines of what they are answered."""
    head = b"POST /v1/images HTTP/1.1\r\nHost: x\r\n"
    kinds = {
        "silent": b"",
        "half a header": head,
        "half a body": head + b"Content-Length: 15\r\n\r\n{",
        "declared too large": head + b"Content-Length: 100000000000\r\n\r\n{",
        "endless chunks": head + b"Transfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b" " * 0x8000 + b"\r\n",
        "endless header": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        "no HTTP": bytes(range(256)),
        "no JSON": head + b"Content-Length: 1\r\n\r\n{",
        "deep JSON": head + b"Content-Length: 60000\r\n\r\n" + b"[" * 60_000,
        "two lengths": head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    }
    answers: dict[str, str] = {}

    def ask(name: str, sent: bytes, address: tuple[str, int]) -> None:
        with socket.create_connection(address, timeout=60) as connection:
            with contextlib.suppress(OSError):  # hung up on in the middle of it
                connection.sendall(sent)
                for _ in range(100 if name == "endless chunks" else 0):
                    connection.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
            try:
                first = connection.recv(1000).split(b"\r\n")[0].decode("latin-1")
            except OSError:
                first = "reset"
        answers[name] = first or "hung up on"

    with bench.service() as service:
        port = int(service.url.rpartition(":")[2])
        with bench.clients(service.url) as fault:
            threads = [threading.Thread(target=ask, args=(*kind, ("127.0.0.1", port))) for kind in kinds.items()]
            idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for connection in idle:
            connection.close()
        memory_MB = service.resident_mb()
    return {
        **fault.found(), "answers": {name: answers[name] for name in kinds}, "idle_connections": len(idle),
        "resident_MB_after": memory_MB, "exit": service.exit_code,
    }  # fmt: skip


FAULTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "worker killed": worker_killed,
    "all workers killed": all_workers_killed,
    "worker hangs": worker_hangs,
    "front killed": lambda bench: killed_and_started_again(bench, "--workers", "2"),
    "one process killed": killed_and_started_again,
    "replica killed": replica_killed,
    "disk full at the start": disk_full_at_start,
    "disk full while serving": disk_full_while_serving,
    "log cannot be written": log_cannot_be_written,
    "bundle damaged at the start": damaged_at_start,
    "bundle damaged while serving": damaged_while_serving,
    "bundle damaged while serving, worker killed": lambda bench: damaged_while_serving(bench, "--workers", "1"),
    "bad requests": bad_requests,
}
REFUSED = ("disk full at the start", "bundle damaged at the start")
MAY_BE_CUT = ("front killed", "one process killed")
"""Nobody is there to answer."""
MAY_BE_LATE = ("worker hangs",)
"""The batch of the worker that hangs is past its deadline when that is found out."""


def verdict(name: str, found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    if "skipped" in found:
        return []
    if name in REFUSED:
        return [
            f"{what}: {one}"
            for what, one in found.items()
            if isinstance(one, dict) and (one["exit"] != 2 or one["traceback"])
        ]
    allowed = {"200", *(["0", "503"] if name in MAY_BE_CUT else []), *(["504"] if name in MAY_BE_LATE else [])}
    wrong = [f"{found['wrong_answers']} wrong images"] if found["wrong_answers"] else []
    wrong += [f"statuses {found['statuses']}"] if set(found["statuses"]) - allowed else []
    wrong += [f"exit code {found['exit']}"] if found["exit"] else []
    unanswered = [n for n, line in found.get("answers", {}).items() if "HTTP/1.1 4" not in line and "hung" not in line]
    return wrong + [f"{n}: {found['answers'][n]}" for n in unanswered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--only", nargs="*", choices=FAULTS, default=[*FAULTS], help="the others stay as they are in --out"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.bundle)
    manifest = bench.bundle.manifest
    result: dict[str, Any] = {
        "bundle": manifest.digest, "model": manifest.model.name, "scheme": manifest.scheme, "cores": os.cpu_count(),
        "machine": platform.machine(), "python": platform.python_version(), "onnxruntime": onnxruntime.__version__,
        "clients": CLIENTS, "faults": {},
    }  # fmt: skip
    if options.out and options.out.exists() and len(options.only) < len(FAULTS):
        kept = json.loads(options.out.read_text())
        result["faults"] = kept["faults"] if kept["bundle"] == manifest.digest else {}
    problems = []
    for name in options.only:
        load_average = round(os.getloadavg()[0], 2)
        found = {**FAULTS[name](bench), "load_average": load_average}
        wrong = verdict(name, found)
        problems += [f"{name}: {one}" for one in wrong]
        result["faults"][name] = {**found, "as_it_should_be": not wrong}
        print(name, json.dumps(found), *wrong, file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
