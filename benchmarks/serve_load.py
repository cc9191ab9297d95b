"""A closed-loop load on `qexport serve`, every answer checked against the image drawn offline (see serve_common).

    python benchmarks/serve_load.py BUNDLE --seconds 1800 --out benchmarks/results/serve_load.json

- bare: images per second of the runtime alone, playing the largest bucket again and again, before and after the rest;
  with `--workers N` on N times the threads, and beside it N processes of one worker's threads each, all at once
- gain: concurrency 1, 8, 32, with batching and without. Without means that every client has a setting of its own (cfg
  shifted by 0.001 k), so that no two may share a batch; the cost of a lone image in a bucket of two stays.
- soak: `--seconds` at `--concurrency`, with resident memory (sampled, and the slope of a straight line through it) and
  figures for every minute

Service, clients and the runtime before and after share the machine; `--threads` are the service's and the runtime's.
What is known so far is written every minute (`complete` says whether that is all), and a table beside it (.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from serve_common import Load, Record, Service, offline, summary

from qexport.bundle import Bundle
from qexport.runtime import Runtime, load
from qexport.serve import ServeSettings

CONCURRENCIES = (1, 8, 32)
GAIN_SECONDS = 12.0
BARE_SECONDS = 20.0
WARM_SECONDS = 2.0
RSS_EVERY_S = 5.0
CHECKPOINT_S = 60.0
WAYS = {"one": "one process on all threads", "apart": "as many processes as workers"}
"""How the runtime alone is run."""
SETTLED = 0.1
"""Share of the soak that is left out of the memory's slope: buffers reach their sizes in it."""


def bare(runtime: Runtime, bucket: int, seconds: float) -> dict[str, float]:
    """Images per second of the runtime alone."""
    given, images = {"label": [0] * bucket}, [(k, 0) for k in range(bucket)]
    runtime.player.play(given, images=images)
    rates = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s or len(rates) < 3:
        start_s = time.monotonic()
        runtime.player.play(given, images=images)
        rates.append(bucket / (time.monotonic() - start_s))
    whole = len(rates) / sum(1 / rate for rate in rates)
    return {
        "images_per_s": round(whole, 3), "median_images_per_s": round(statistics.median(rates), 3),
        "best_images_per_s": round(max(rates), 3), "batches": len(rates), "load_average": os.getloadavg()[0],
    }  # fmt: skip


def bare_apart(bundle: Path, bucket: int, seconds: float, threads: int, processes: int) -> dict[str, float]:
    """Images per second of so many processes together, each the runtime alone; they start within the first second."""
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(here)!r}); from pathlib import Path\n"
        "from serve_load import bare; from qexport.runtime import load\n"
        f"runtime = load(Path({str(bundle)!r}), provider='cpu', threads={threads})\n"
        f"print(bare(runtime, {bucket}, {seconds})['images_per_s'])"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(processes)]
    rates = [float(process.communicate()[0]) for process in started]
    return {"images_per_s": round(sum(rates), 3), "processes": processes}


def slope(rss_MB: list[tuple[float, float]]) -> dict[str, float] | None:
    """Growth of memory: a straight line through the samples after the first `SETTLED` share of the time."""
    settled = [(t, m) for t, m in rss_MB if t >= SETTLED * rss_MB[-1][0]]
    if len(settled) < 3:
        return None
    times_s, sizes_MB = np.array(settled).T
    per_s, _ = np.polyfit(times_s, sizes_MB, 1)
    return {
        "MB_per_hour": round(float(per_s) * 3600, 2), "first_MB": float(sizes_MB[0]), "last_MB": float(sizes_MB[-1]),
        "lowest_MB": float(sizes_MB.min()), "highest_MB": float(sizes_MB.max()), "samples": len(settled),
    }  # fmt: skip


def drive(service: Service, one: Load, seconds: float, checkpoint: Any = None) -> dict[str, Any]:
    """Load for so long; `checkpoint` is called with what is known every minute."""
    rss_MB: list[tuple[float, float]] = []
    minutes: list[dict[str, Any]] = []
    begin_s = time.monotonic()
    end_s = begin_s + seconds
    loading = threading.Thread(target=one.run, args=(lambda: time.monotonic() >= end_s,))
    loading.start()

    def so_far(until_s: float) -> dict[str, Any]:
        found = {"concurrency": one.clients, **summary(one.records, begin_s, until_s)}
        return {**found, "memory": slope(rss_MB) if rss_MB else None, "minutes": minutes, "rss_MB": rss_MB}

    while loading.is_alive():
        rss_MB.append((round(time.monotonic() - begin_s, 1), service.resident_mb()))
        if len(minutes) < int((time.monotonic() - begin_s) / CHECKPOINT_S):
            start_s = begin_s + len(minutes) * CHECKPOINT_S
            minutes.append(_short(one.records, start_s, start_s + CHECKPOINT_S))
            if checkpoint is not None:
                checkpoint(so_far(time.monotonic()))
        loading.join(RSS_EVERY_S)
    return so_far(max((r.at_s for r in one.records), default=end_s))


def _short(records: list[Record], begin_s: float, end_s: float) -> dict[str, Any]:
    full = summary(records, begin_s, end_s)
    return {name: full[name] for name in ("images_per_s", "p50_ms", "p99_ms", "statuses", "wrong_answers")}


def table(result: dict[str, Any]) -> str:
    """The result in words and a table."""
    soak, before, after = result.get("soak"), result["bare"], result.get("bare_after")
    lines = [
        f"# Load on `qexport serve`: {result['model']} {result['scheme']}, {result['cores']} cores, "
        f"{result['threads']} thread(s), ONNX Runtime {result['onnxruntime']}",
        "",
        f"Load of the machine before: {result['load_average_before'][0]:.2f}. The runtime alone, images/s: "
        + "; ".join(
            f"{WAYS[way]} {found['images_per_s']:.2f} before"
            + (f", {after[way]['images_per_s']:.2f} after" if after else "")
            for way, found in before.items()
        )
        + ".",
        "",
        "| clients | batching | images/s | p50 ms | p99 ms | wrong of checked |",
        "|---|---|---|---|---|---|",
    ]
    rows = [*result.get("gain", []), *([{**soak, "batching": True}] if soak else [])]
    for row in rows:
        name = f"{row['concurrency']}" + (f", for {row['seconds']:.0f} s" if row["seconds"] > 100 else "")
        lines.append(
            f"| {name} | {'yes' if row['batching'] else 'no'} | {row['images_per_s']:.2f} | {row['p50_ms']} "
            f"| {row['p99_ms']} | {row['wrong_answers']} of {row['checked_answers']} |"
        )
    if soak:
        memory = soak["memory"]
        lines += ["", f"Soak: statuses {soak['statuses']}, deadline {result['deadline_s']:.0f} s."]
        lines.append(f"Slowest answer: {soak['max_ms']} ms.")
        if memory:
            grown = f"slope {memory['MB_per_hour']:+.1f} MB an hour"
            lines.append(f"Memory: {memory['first_MB']:.0f} MB to {memory['last_MB']:.0f} MB, {grown}.")
        if "share_of_bare" in result:
            shares = ", ".join(f"{share:.3f} ({WAYS[way]})" for way, share in result["share_of_bare"].items())
            lines.append(f"Throughput, as a share of the runtime alone (mean of before and after): {shares}.")
    if not result["complete"]:
        lines += ["", "The run was not finished when this was written."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--gain-seconds", type=float, default=GAIN_SECONDS)
    parser.add_argument("--bare-seconds", type=float, default=BARE_SECONDS)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, help="processes that draw; none: one process serves and draws")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    classes = bundle.manifest.model.num_classes
    cfg = next(i.default for i in bundle.plan.inputs if i.name == "cfg")
    limits = ServeSettings()
    buckets = limits.buckets
    result: dict[str, Any] = {
        "complete": False, "bundle": bundle.manifest.digest, "model": bundle.manifest.model.name,
        "scheme": bundle.manifest.scheme, "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "threads": options.threads, "workers": options.workers,
        "load_average_before": os.getloadavg(), "onnxruntime": onnxruntime.__version__, "buckets": buckets,
        "deadline_s": limits.deadline_s,
    }  # fmt: skip

    def write(more: dict[str, Any]) -> None:
        result.update(more)
        if options.out:
            new = options.out.with_suffix(".new")
            new.write_text(json.dumps(result, indent=1) + "\n")
            new.replace(options.out)
            options.out.with_suffix(".md").write_text(table(result))

    clients = max(*CONCURRENCIES, options.concurrency)
    workers = options.workers or 1
    runtime = load(options.bundle, provider="cpu", threads=options.threads * workers)
    together = offline(runtime, clients, buckets)
    alone = offline(runtime, clients, buckets[:1], True, cfg)
    differ = sum(len({together[k, bucket] for bucket in buckets}) > 1 for k in range(clients))

    def alone_now() -> dict[str, Any]:
        found: dict[str, Any] = {"one": bare(runtime, buckets[-1], options.bare_seconds)}
        if workers > 1:
            found["apart"] = bare_apart(options.bundle, buckets[-1], options.bare_seconds, options.threads, workers)
        return found

    before = alone_now()
    write({"images_that_differ_between_buckets": differ, "bare": before})
    more = ["--queue", str(4 * clients)] + (["--workers", str(options.workers)] if options.workers else [])
    with Service(options.bundle, *more, threads=options.threads) as service:
        if options.workers:
            service.wait("ready", options.workers)

        def run(count: int, seconds: float, apart: bool, checkpoint: Any = None) -> dict[str, Any]:
            references = alone if apart else together
            drive(service, Load(service.url, count, references, classes, apart, cfg), WARM_SECONDS)
            got = drive(service, Load(service.url, count, references, classes, apart, cfg), seconds, checkpoint)
            print(json.dumps({k: v for k, v in got.items() if k not in ("rss_MB", "minutes")}), file=sys.stderr)
            return got

        gain = []
        for count in CONCURRENCIES:
            for apart in (False, True):
                row = run(count, options.gain_seconds, apart)
                gain.append({"batching": not apart, **{k: v for k, v in row.items() if k not in ("minutes", "memory")}})
                write({"gain": gain})
        write({"soak": run(options.concurrency, options.seconds, False, lambda got: write({"soak": got}))})
    after = alone_now()
    shares = {
        way: round(
            result["soak"]["images_per_s"] / statistics.mean([before[way]["images_per_s"], found["images_per_s"]]), 3
        )
        for way, found in after.items()
    }
    write(
        {
            "bare_after": after,
            "share_of_bare": shares,
            "exit": {"code": service.exit_code, "drain_s": service.drain_s},
            "complete": True,
        }
    )
    print(table(result))
    if result["soak"]["wrong_answers"] or any(row["wrong_answers"] for row in gain) or service.exit_code:
        raise SystemExit("wrong answers, or a bad end")


if __name__ == "__main__":
    main()
