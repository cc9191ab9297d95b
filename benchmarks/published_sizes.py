"""Models of published size, filled with random numbers, to W4: seconds, memory, bytes, parity of a step, and peers.

    python benchmarks/published_sizes.py --models var-d16,dit-xl-2-256 --peers --out benchmarks/results/published_sizes

Every measurement has a fresh process, one at a time; peak memory is that process's `ru_maxrss` when the bundle is
written. This process imports nothing but the standard library: a child's `ru_maxrss` starts at what its parent held.
Results are merged by model into OUT.json (each with its own environment and load) and shown in OUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GIB, MB = 1 << 30, 1_000_000
FP32_BYTES = 4
SEED = 0
CHECKED_CALLS = 2
"""Calls of the first graph that are compared: the first, and one that reads what it left (caches, tokens)."""

PEER_MODEL = "dit-xl-2-256"
MODELOPT_PYTHON = Path("/tmp/modelopt/bin/python")


@dataclass(frozen=True)
class Goal:
    """What the project set out to reach; None where it named nothing."""

    seconds: float | None = None
    peak_rss_bytes: int | None = None  # else 1.3 × the fp32 weights + 1 GiB
    loop_bytes: int | None = None  # the graph that is looped, with its weights

    def peak(self, fp32_bytes: int) -> int:
        """Bytes that the process may have held."""
        return self.peak_rss_bytes or int(1.3 * fp32_bytes) + GIB


GOALS = {
    "var-d16": Goal(seconds=60),
    "dit-xl-2-256": Goal(seconds=90, loop_bytes=402 * MB),
    "llamagen-xl-384": Goal(),
    "var-d30": Goal(seconds=360, peak_rss_bytes=20 * GIB),
}
UNCHECKED = ("var-d30",)
"""Torch and ONNX Runtime side by side would need 25 GiB."""


# In children --------------------------------------------------------------------------------------------------------


def quantise_child(model: str, folder: str) -> dict[str, Any]:
    import resource

    from graph_weights import graph_weights

    from qexport.pipeline import quantize
    from qexport.scheme import preset
    from qexport.verify.environment import describe_environment

    marks: list[tuple[str, float, float]] = []

    def tell(stage: str, done: int, total: int) -> None:
        del done, total
        if not marks or marks[-1][0] != stage:
            marks.append((stage, time.perf_counter(), time.process_time()))

    bundle = quantize(model, random_weights=SEED, scheme=preset(4), out=folder, progress=tell)
    marks.append(("end", time.perf_counter(), time.process_time()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before anything is looked at

    manifest = bundle.manifest
    spans = {before[0]: (after[1] - before[1], after[2] - before[2]) for before, after in pairwise(marks)}
    root = Path(bundle.path)
    looped = manifest.plan.calls[0].graph
    blocks = [row for row in manifest.layers if row["name"].split(".")[0] in ("blocks", "layers")]
    return {
        "source": manifest.model.source,
        "seconds": {stage: round(wall, 2) for stage, (wall, _) in spans.items()},
        "cpu_seconds": {stage: round(cpu, 2) for stage, (_, cpu) in spans.items()},
        "seconds_total": round(marks[-1][1] - marks[0][1], 2),
        "peak_rss_bytes": peak,
        "fp32_weight_bytes": manifest.totals["weights_all"] * FP32_BYTES,
        "files": {str(p.relative_to(root)): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()},
        "loop_graph": looped,
        "graphs": {name: graph_weights(root / file) for name, file in manifest.graphs.items()},
        "block_matrices": len(blocks),
        "block_matrices_quantised": sum(row["algorithm"] is not None for row in blocks),
        "totals": manifest.totals,
        "environment": describe_environment("cpu"),
    }


def check_child(model: str, folder: str) -> dict[str, Any]:
    """Relative L2 of every floating output of the first calls, ONNX Runtime on the CPU against torch, same feeds."""
    import gc

    import numpy as np
    import torch

    from qexport.bundle import Bundle
    from qexport.family import load_random
    from qexport.numerics.metrics import relative_l2
    from qexport.quantize import apply_stored, stored_weights
    from qexport.recipe_toml import read_recipe
    from qexport.reference.backend import torch_player
    from qexport.runtime import CallRecord
    from qexport.runtime.session import make_session
    from qexport.targets import QuantTraits, session_config

    class Enough(Exception):  # noqa: N818 - it is no error
        pass

    bundle = Bundle.open(folder, check="size")
    generator = load_random(model, SEED)
    apply_stored(generator, stored_weights(generator, read_recipe(Path(bundle.path) / bundle.manifest.recipe)))
    graph = generator.plan.calls[0].graph
    spec = generator.graph(graph)
    calls: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    def keep(record: CallRecord[torch.Tensor]) -> None:
        feeds = {name: value.numpy() for name, value in record.feeds.items()}
        calls.append((feeds, {name: value.detach().numpy() for name, value in record.results.items()}))
        if len(calls) == CHECKED_CALLS:
            raise Enough

    start = time.perf_counter()
    try:
        outputs = {graph: tuple(port.name for port in spec.outputs)}
        torch_player(generator).play({"label": [7]}, seed=SEED, observer=keep, extra_outputs=outputs)
    except Enough:
        pass
    torch_seconds = time.perf_counter() - start
    del generator, spec
    gc.collect()
    start = time.perf_counter()
    root = Path(bundle.path)
    session = make_session(root / bundle.manifest.graphs[graph], root, session_config("cpu", "exact", QuantTraits()))
    session_seconds = time.perf_counter() - start
    start = time.perf_counter()
    errors: dict[str, float] = {}
    differing = 0
    for feeds, expected in calls:
        found = session.run(list(expected), feeds)
        for (name, wanted), got in zip(expected.items(), found, strict=True):
            if np.issubdtype(wanted.dtype, np.floating):
                errors[name] = max(errors.get(name, 0.0), relative_l2(np.asarray(got), wanted))
            else:
                differing += int(np.count_nonzero(np.asarray(got) != wanted))
    worst = max(errors, key=lambda name: errors[name])
    return {
        "graph": graph,
        "calls": len(calls),
        "relative_l2_worst": errors[worst],
        "worst_output": worst,
        "relative_l2": {name: errors[name] for name in ("logits", "output", worst) if name in errors},
        "integers_that_differ": differing,
        "seconds": {
            "torch": round(torch_seconds, 2),
            "session": round(session_seconds, 2),
            "onnxruntime": round(time.perf_counter() - start, 2),
        },
    }


# Here ---------------------------------------------------------------------------------------------------------------


def child(command: Sequence[str | Path]) -> dict[str, Any]:
    """The JSON on the last line of a process's output, with the machine's load; `failed` says what went wrong."""
    before, start = os.getloadavg(), time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=HERE)
    measured = {
        "process_seconds": round(time.perf_counter() - start, 1),
        "loadavg_before": before,
        "loadavg_after": os.getloadavg(),
    }
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return {"failed": last[:500], **measured}
    return {**json.loads(done.stdout.splitlines()[-1]), **measured}


def measure_model(model: str, folder: Path, check: bool) -> dict[str, Any]:
    result = child([sys.executable, __file__, "--child", "quantise", model, folder])
    if "failed" not in result:
        result["goals"] = goals_of(model, result)
        if check:
            result["check"] = child([sys.executable, __file__, "--child", "check", model, folder])
    return result


def goals_of(model: str, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    goal = GOALS.get(model, Goal())
    values = {
        "seconds_total": (result["seconds_total"], goal.seconds),
        "peak_rss_bytes": (result["peak_rss_bytes"], goal.peak(result["fp32_weight_bytes"])),
        "loop_bytes": (result["graphs"][result["loop_graph"]]["size_bytes"], goal.loop_bytes),
    }
    found = {name: {"value": v, "goal": g, "holds": v <= g} for name, (v, g) in values.items() if g is not None}
    blocks, quantised = result["block_matrices"], result["block_matrices_quantised"]
    return found | {"block_matrices": {"value": quantised, "goal": blocks, "holds": 0 < blocks == quantised}}


def measure_peers(folder: Path, modelopt_python: Path) -> dict[str, Any]:
    peers = HERE / "peers"
    plain = folder / "plain" / "dit.onnx"
    plain.parent.mkdir()
    found = {"torch.onnx.export": child([sys.executable, peers / "torch_export.py", PEER_MODEL, plain])}
    for name, python, script in (
        ("MatMulNBitsQuantizer", Path(sys.executable), "ort_nbits.py"),
        ("Model-Optimizer int4", modelopt_python, "modelopt_int4.py"),
    ):
        out = folder / script.removesuffix(".py") / "dit.onnx"
        out.parent.mkdir()
        if not python.exists():
            found[name] = {"failed": f"{python} is not there: python -m venv and pip install 'nvidia-modelopt[onnx]'"}
        elif "failed" in found["torch.onnx.export"]:
            found[name] = {"failed": "there is no exported file to work on"}
        else:
            found[name] = child([python, peers / script, plain, out])
        if "failed" not in found[name]:
            found[name]["file"] = child([sys.executable, HERE / "graph_weights.py", out])
    if "failed" not in found["torch.onnx.export"]:
        found["torch.onnx.export"]["file"] = child([sys.executable, HERE / "graph_weights.py", plain])
    return found


def markdown(report: dict[str, Any]) -> str:
    good = {name: r for name, r in report["models"].items() if "failed" not in r}
    lines = [
        "# Published sizes, random weights, W4 in groups of 32",
        "",
        "Written by `benchmarks/published_sizes.py`. Random numbers stand for the checkpoints: sizes, times and parity",
        "mean something here, quality nothing. Seconds by stage; `load` is filling with random numbers. The load",
        "average is the whole machine's, before and after: above 2 on two cores others worked too, and the seconds are",
        "too many; `cpu_seconds` in the JSON are this process's own.",
        "",
        "| model | load | capture | quantise | write | total s (goal) | peak GiB (goal) | looped graph MB (goal) "
        "| decode MB | block matrices int4 | load average |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in good.items():
        seconds, graphs, goals = r["seconds"], r["graphs"], r["goals"]
        loop = r["loop_graph"]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{seconds[stage]:.1f}" for stage in ("load", "capture", "quantise", "write"))
            + f" | {r['seconds_total']:.1f}{_goal(goals, 'seconds_total', 1)}"
            + f" | {r['peak_rss_bytes'] / GIB:.2f}{_goal(goals, 'peak_rss_bytes', GIB)}"
            + f" | `{loop}` {graphs[loop]['size_bytes'] / MB:.1f}{_goal(goals, 'loop_bytes', MB)}"
            + f" | {graphs['decode']['size_bytes'] / MB:.1f}"
            + f" | {r['block_matrices_quantised']} of {r['block_matrices']}"
            + f" | {r['loadavg_before'][0]:.1f} → {r['loadavg_after'][0]:.1f} |"
        )
    lines += [f"| {name} | failed: {r['failed']} |" for name, r in report["models"].items() if "failed" in r]
    checks = {name: r["check"] for name, r in good.items() if "check" in r}
    if checks:
        lines += ["", "One step, ONNX Runtime on the CPU (`exact` options) against torch on the same inputs:", ""]
        lines += [
            "| model | graph | calls | worst relative L2 | output | integers that differ |",
            "|---|---|---|---|---|---|",
        ]
    for name, c in checks.items():
        cells = (
            f"failed: {c['failed']}"
            if "failed" in c
            else f"`{c['graph']}` | {c['calls']} | {c['relative_l2_worst']:.2e} | `{c['worst_output']}` "
            f"| {c['integers_that_differ']}"
        )
        lines.append(f"| {name} | {cells} |")
    if peers := report.get("peers"):
        ours = good.get(PEER_MODEL)
        lines += [
            "",
            f"Peers on {PEER_MODEL}, the transformer alone; seconds of each step by itself, building the module not",
            "counted. Ours are capture, quantising and writing, and include the `decode` graph:",
            "",
            "| | seconds | peak GiB | MB | matrix products int4 / fp16 / fp32 | large ones not int4 | × our bytes |",
            "|---|---|---|---|---|---|---|",
        ]
        size = ours["graphs"]["denoise"]["size_bytes"] if ours else None
        if ours and size:
            took = sum(s for stage, s in ours["seconds"].items() if stage != "load")
            lines.append(_peer_row("**qexport**", took, ours["peak_rss_bytes"], ours["graphs"]["denoise"], size))
        for name, p in peers.items():
            if "failed" in p:
                lines.append(f"| {name} | failed: {p['failed']} |")
            else:
                lines.append(_peer_row(name, p["seconds"], p["peak_rss_bytes"], p["file"], size))
    return "\n".join(lines) + "\n"


def _goal(goals: dict[str, dict[str, Any]], name: str, unit: int) -> str:
    if name not in goals:
        return ""
    return f" ({goals[name]['goal'] / unit:.4g}{'' if goals[name]['holds'] else ', **missed**'})"


def _peer_row(name: str, seconds: float, peak: int, file: dict[str, Any], ours: int | None) -> str:
    kinds = " / ".join(str(file["matrices"].get(kind, 0)) for kind in ("int4", "float16", "float32"))
    ratio = f"{file['size_bytes'] / ours:.2f}" if ours else ""
    size = f"{file['size_bytes'] / MB:.1f}"
    return f"| {name} | {seconds:.1f} | {peak / GIB:.2f} | {size} | {kinds} | {file['kept_wide']} | {ratio} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(GOALS), help="comma separated; empty for none")
    parser.add_argument("--check", choices=("auto", "all", "none"), default="auto", help="auto leaves var-d30 out")
    parser.add_argument("--peers", action="store_true", help=f"also what exists today, on {PEER_MODEL}")
    parser.add_argument(
        "--modelopt-python", type=Path, default=MODELOPT_PYTHON, help="environment with nvidia-modelopt"
    )
    parser.add_argument("--scratch", type=Path, help="folder for bundles while they are measured (several GB)")
    parser.add_argument("--out", type=Path, help="path without suffix: OUT.json and OUT.md")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        kind, model, folder = args.child
        print(json.dumps({"quantise": quantise_child, "check": check_child}[kind](model, folder)))
        return
    path = args.out.with_suffix(".json") if args.out else None
    report: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {"models": {}}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for number, model in enumerate(filter(None, args.models.split(","))):
            check = args.check == "all" or (args.check == "auto" and model not in UNCHECKED)
            report["models"][model] = measure_model(model, Path(folder) / str(number), check)
        if args.peers:
            report["peers"] = measure_peers(Path(folder), args.modelopt_python)
    report["command"] = "python benchmarks/published_sizes.py"
    report["models"] = dict(sorted(report["models"].items(), key=lambda item: [*GOALS, item[0]].index(item[0])))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
