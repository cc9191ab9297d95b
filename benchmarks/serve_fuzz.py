"""schemathesis against `qexport serve`, from its own OpenAPI description, and then: does it still draw the same image?

    python benchmarks/serve_fuzz.py BUNDLE --schemathesis PATH/TO/schemathesis --cases 10000 \\
        --out benchmarks/results/serve_fuzz.json

schemathesis is not among the developer tools, as its pytest plugin would load for every test: install it into an
environment of its own. Half of the cases fit the description (mode positive), half break it (negative); schemathesis is
run again with the next seed until ``POST /v1/images`` has answered so many requests by the service's own count.
Checked: documented statuses and content types only, answers that fit their schema, data that breaks the schema refused,
other methods refused as they should be, and by the service's own figures no 500 (a 504 is right where a case asks for
an image within a nanosecond).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2

from qexport.bundle import Bundle

CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
REQUEST = {"labels": [1], "seed": 5}
FEWEST = 50
"""Cases of a run, so that the last ones do not start it again and again."""
MODES = ("negative", "positive")
MAX_ROUNDS = 20
"""Runs for each mode: a run ends early where schemathesis finds no new cases."""
NO_FAILURE = {"200", "400", "405", "408", "413", "422", "429", "499", "504"}
"""Statuses that a case may rightly have got; 499 is the log's word for a client that left, 405 another method."""


def counts(url: str) -> dict[str, dict[str, int]]:
    """Answers by path and status, as the service counted them."""
    found: dict[str, dict[str, int]] = {}
    text = httpx2.get(f"{url}/metrics", timeout=60).text
    for path, status, n in re.findall(r'^qexport_requests_total\{path="(.*)",status="(\d+)"\} (\S+)$', text, re.M):
        found.setdefault(path, {})[status] = int(float(n))
    return found


def images(answered: dict[str, dict[str, int]]) -> int:
    """Requests for images among them."""
    return sum(answered.get("/v1/images", {}).values())


def fuzz(program: Path, url: str, cases: int, mode: str, seed: int) -> tuple[bool, str]:
    """One run of schemathesis: whether it found nothing, and its report."""
    command = [str(program), "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "--mode", mode]
    command += ["--workers", "2"]
    command += ["--max-examples", str(cases), "--phases", "examples,coverage,fuzzing", "--seed", str(seed)]
    command += ["--continue-on-failure", "--no-color"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode == 0, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--schemathesis", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--workers", type=int, help="processes that draw behind the front")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    manifest = Bundle.open(options.bundle, "size").manifest
    code = "from qexport_cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", str(options.bundle), "--port", "0", "--threads", "1"]
    if options.workers:
        command += ["--workers", str(options.workers)]
    service = subprocess.Popen([*command, "--max-images", "2"], stderr=subprocess.PIPE, text=True)
    assert service.stderr is not None
    url = ""
    for line in service.stderr:
        event = json.loads(line)
        if event["event"] == "listening":
            url = f"http://127.0.0.1:{event['port']}"
        if event["event"] == "ready":
            break
    log = subprocess.Popen(["cat"], stdin=service.stderr, stdout=subprocess.DEVNULL)
    reports: list[str] = []
    by_mode: dict[str, int] = {}
    passed = True
    answered: dict[str, dict[str, int]] = {}
    start_s = time.monotonic()
    try:
        before = httpx2.post(f"{url}/v1/images", json=REQUEST, timeout=60).content
        for mode in MODES:
            asked = options.cases // len(MODES)
            answered_before = images(counts(url))
            for seed in range(1, MAX_ROUNDS + 1):
                left = asked - images(counts(url)) + answered_before
                if left <= 0 or not passed:
                    break
                passed, report = fuzz(options.schemathesis, url, max(left, FEWEST), mode, seed)
                print(report, file=sys.stderr)
                reports.append(report)
            by_mode[mode] = images(counts(url)) - answered_before
        answered = counts(url)
        same = httpx2.post(f"{url}/v1/images", json=REQUEST, timeout=60).content == before
        ready = httpx2.get(f"{url}/readyz").status_code == 200
    finally:
        service.terminate()
        code_at_end = service.wait(90)
        log.wait(10)
    unexpected = sorted(set(answered.get("/v1/images", {})) - NO_FAILURE)
    version = subprocess.run([str(options.schemathesis), "--version"], capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {
        "bundle": manifest.digest, "model": manifest.model.name, "scheme": manifest.scheme, "workers": options.workers,
        "schemathesis": version, "python": platform.python_version(), "fastapi": importlib.metadata.version("fastapi"),
        "uvicorn": importlib.metadata.version("uvicorn"), "checks": CHECKS, "rounds": len(reports),
        "cases_asked": options.cases, "cases_images": sum(by_mode.values()), "cases_by_mode": by_mode,
        "cases_all_paths": sum(n for path in answered.values() for n in path.values()) - 1,
        "answers": {path: dict(sorted(statuses.items())) for path, statuses in sorted(answered.items())},
        "seconds": round(time.monotonic() - start_s), "findings_of_schemathesis": not passed,
        "unexpected_statuses": unexpected, "same_image_after": same, "ready_after": ready, "exit_code": code_at_end,
    }  # fmt: skip
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    enough = result["cases_images"] >= options.cases
    good = passed and same and ready and not unexpected and enough and code_at_end == 0
    if options.out:
        options.out.write_text(json.dumps({**result, "passed": good}, indent=1) + "\n")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
