"""The CPU provider: bundles, portable and lowered to ort-cpu, against torch eager and torch.compile, in one run.

    python benchmarks/cpu_targets.py --out benchmarks/results/cpu_targets          (the whole table, about an hour)
    python benchmarks/cpu_targets.py --models var-d16 --whole --batches 1          (images of it, not ten steps)
    python benchmarks/cpu_targets.py --models var-d16 --batches 8 --targets ort-cpu --against fp32 --forms W8A8
    python benchmarks/cpu_targets.py --rehearse                                    (two minutes: does it run at all?)

Bundles are made here and measured by `qexport bench`, whose rules hold: every contender in a process of its own, in
turns, ratios of times in the same turn, memory above an empty process. Whole images of the small models, one denoising
step of DiT-B/2, the ten steps of var-d16 without its decoder; where whole images are made, W8A8 with the decoder in
int8, too (W8A8-D8). Weights of the published shapes are random numbers; speed does not depend on them. All contenders
are in memory together: more than four of var-d16 at batch 8 do not fit into 24 GiB, so fewer are asked for there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SEED = 0
TARGET = "ort-cpu"
FORMS = {"W8A8": (8, 8, 16), "W8A16": (8, 16, 16), "W4A16": (4, 16, 16), "W8A8-D8": (8, 8, 8)}
"""Bits of weights, of activations, and of the decoder's convolutions, both."""

AGAINST = "fp32,fp16,eager,compile"


@dataclass(frozen=True)
class Subject:
    """A model and how much of its plan is played: `calls` of graphs, None for whole images."""

    name: str
    calls: int | None
    random: bool


SUBJECTS = (
    Subject("dit-b-2-256", 1, random=True),
    Subject("var-d16", 10, random=True),
    Subject("dit-c10-d4", None, random=False),
    Subject("var-c10-d4", None, random=False),
)
REHEARSAL = (Subject("dit-c10-d2", 2, random=False), Subject("var-c10-d2", None, random=False))


def make_bundle(subject: Subject, wbits: int, abits: int, decoder: int, folder: str) -> None:
    """Quantise, with a calibration that is just enough for scales, and lower."""
    from qexport.lower import lower
    from qexport.pipeline import quantize
    from qexport.request import Request, decoder_scheme
    from qexport.scheme import preset

    request = Request(preset(wbits, abits), samples=1, decoder=decoder_scheme(decoder, decoder))
    quantize(subject.name, request=request, random_weights=SEED if subject.random else None, out=folder)
    lower(folder, TARGET)


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own, so that its memory is given back."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{arguments}: failed, see above")


def measure(subject: Subject, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every form and batch of one model."""
    from qexport.bench.run import bench

    bundles = []
    for name in args.forms.split(","):
        wbits, abits, decoder = FORMS[name]
        if decoder == 8 and subject.calls is not None:
            continue  # it is not played
        bundles.append(folder / f"{subject.name}-{name}")
        in_a_process(make_bundle, subject, wbits, abits, decoder, str(bundles[-1]))
    report = bench(
        bundles,
        batches=[int(size) for size in args.batches.split(",")],
        provider="cpu",
        targets=args.targets.split(","),
        threads=args.threads,
        runs=args.repeats,
        warm_up=args.warmup,
        against=[name for name in args.against.split(",") if name != "compile" or not args.no_compile],
        calls=subject.calls,
        reports=False,
    )
    return report.to_json()


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [f"# CPU provider ({report['environment']['cpu']}, {report['arguments']['threads']} threads)", ""]
    for name, subject in report["results"].items():
        rows = subject["contenders"]
        held = {row["name"]: row["memory_bytes"]["session"] for row in rows}
        for size in sorted({size for row in rows for size in row["batches"]}, key=int):
            lines += [f"## {name}, batch {size}, {subject['settings']['played']}", ""]
            lines += ["| contender | ms | p25–p75 | × compile | × eager | × fp32 | memory, of fp32 | load s |"]
            lines += ["|---|---|---|---|---|---|---|---|"]
            whole = next((held[row["name"]] for row in rows if row["name"] == "fp32" and size in row["batches"]), None)
            for row in rows:
                batch = row["batches"].get(size)
                if batch is None:
                    continue
                ms, ratios = batch["latency_ms"]["total"], batch["times_as_fast_as"]
                cells = [row["name"], f"{ms['median']:.4g}", f"{ms['p25']:.4g}–{ms['p75']:.4g}"]
                bases = ("torch.compile", "torch eager", "fp32")
                cells += [f"{ratios[base]['median']:.2f}" if base in ratios else "–" for base in bases]
                share = held[row["name"]] / whole if whole and held[row["name"]] else None
                cells += ["–" if share is None else f"{share:.2f}", f"{row['load_s']:.2f}"]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
        lines += [f"- {sentence}" for sentence in subject["words"]]
        left_out = {row["name"]: row["failed"] for row in rows if row.get("failed")} | subject["left_out"]
        lines += [f"- without {what}: {why}" for what, why in left_out.items()] + [""]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="comma-separated; all by default")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--whole", action="store_true", help="whole images of every model")
    parser.add_argument("--forms", default=",".join(FORMS), help="which of our bundles take part")
    parser.add_argument("--targets", default=f"portable,{TARGET}", help="which graphs of the bundles take part")
    parser.add_argument("--against", default=AGAINST, help="references of `qexport bench`")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.add_argument("--rehearse", action="store_true", help="tiny models and one repeat")
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    args = parser.parse_args(argv)
    if unknown := set(args.forms.split(",")) - set(FORMS):
        parser.error(f"--forms {', '.join(sorted(unknown))}: choose from {', '.join(FORMS)}")
    subjects = REHEARSAL if args.rehearse else SUBJECTS
    if args.rehearse:
        args.batches, args.repeats, args.warmup = "1,2", 1, 1
    if args.models:
        subjects = tuple(subject for subject in subjects if subject.name in args.models.split(","))
    if args.whole:
        subjects = tuple(replace(subject, calls=None) for subject in subjects)
    from qexport.verify.environment import describe_environment

    report: dict[str, Any] = {
        "command": "python benchmarks/cpu_targets.py",
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "environment": describe_environment("cpu"),
        "results": {},
    }
    for subject in subjects:
        with tempfile.TemporaryDirectory(prefix="qexport-cpu-targets-") as folder:
            report["results"][subject.name] = measure(subject, args, Path(folder))
        if args.out:  # after each model: it takes long
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
