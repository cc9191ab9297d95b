"""What threads that wait cost when two processes share the processor: torch's and ONNX Runtime's.

    python benchmarks/waiting_threads.py BUNDLE --out benchmarks/results/waiting_threads.json

- torch: a mix of matrix products and softmax, in one or two processes with one or two OpenMP threads each, with
  OpenMP's own way of waiting and with ``OMP_WAIT_POLICY=PASSIVE``; seconds of each process
- ONNX Runtime: one image of the bundle on two threads that spin between runs or do not, in turns, alone and beside two
  processes of the mix; median milliseconds, and milliseconds of processor time

Made for two processors; say so of others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime

MIX = """
import sys, time, torch
a, b, l = torch.randn(512, 256), torch.randn(256, 1024), torch.randn(16, 8, 64, 64)
def once():
    torch.nn.functional.gelu(a @ b) @ b.T
    torch.softmax(l, -1)
for _ in range(50): once()
count, start = int(sys.argv[1]), time.perf_counter()
while count: once(); count -= 1
print(time.perf_counter() - start)
"""
FOR_EVER = "-1"
SETTINGS = ((1, 1, ""), (1, 2, ""), (2, 1, ""), (2, 2, ""), (2, 2, "PASSIVE"))
"""Processes, threads of each, how they wait ("": as OpenMP does by itself, which is to spin for a while)."""


def mix(count: str, threads: int, waits: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment |= {"OMP_WAIT_POLICY": waits} if waits else {}
    return subprocess.Popen([sys.executable, "-c", MIX, count], env=environment, stdout=subprocess.PIPE, text=True)


def torch_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for processes, threads, waits in SETTINGS:
        started = [mix(str(count), threads, waits) for _ in range(processes)]
        seconds = [round(float(process.communicate()[0]), 2) for process in started]
        rows.append({"processes": processes, "threads": threads, "waits": waits or "default", "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


@contextmanager
def company(processes: int) -> Iterator[None]:
    started = [mix(FOR_EVER, 1) for _ in range(processes)]
    try:
        time.sleep(4 if started else 0)  # torch is imported
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def image_rows(bundle: Path, turns: int) -> list[dict[str, Any]]:
    from qexport.runtime import load, runtime

    ours = runtime.session_config

    def spinning(*given: Any) -> Any:
        config = ours(*given)
        return replace(config, entries={**config.entries, "session.intra_op.allow_spinning": "1"})

    forms = {"sleeping": load(bundle, provider="cpu", threads=2)}
    runtime.session_config = spinning
    forms["spinning"] = load(bundle, provider="cpu", threads=2)
    runtime.session_config = ours
    rows = []
    for beside in (0, 2):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
        with company(beside):
            for _ in range(turns + 1):
                for name, form in forms.items():
                    start_s, used_s = time.perf_counter(), time.process_time()
                    form.generate([1], seed=0)
                    spent_s = time.perf_counter() - start_s
                    time.sleep(0.1)  # what threads do afterwards counts for them, not for the other form
                    times[name].append((spent_s * 1e3, (time.process_time() - used_s) * 1e3))
        for name, found in times.items():
            wall_ms, used_ms = (round(statistics.median(column), 1) for column in zip(*found[1:], strict=True))
            least = round(min(wall for wall, _ in found[1:]), 1)
            rows.append({"beside": beside, "form": name, "ms": wall_ms, "least_ms": least, "processor_ms": used_ms})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=500, help="repeats of the mix")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "processors": os.cpu_count(), "load_average": os.getloadavg()[0], "onnxruntime": onnxruntime.__version__,
        "torch": torch_rows(options.count), "image": image_rows(options.bundle, options.turns),
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
