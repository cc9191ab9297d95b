"""Every loss on every scheme with several seeds: what distillation makes of the reference models, in one table.

    python benchmarks/topkld_quality.py --images cifar_test.npz [--models var-c10-d2 …] [--schemes W2 …]
        [--losses forward split …] [--top-k 900 …] [--seeds 0 1 2] [--steps 400] [--start mse] [--train FILE]
        [--lr 0.01 …] [--scale-lr 0.007 …] [--ema 0.99 …] [--rest-lr 0.005 …] [--plan FILE] [--stop-after S]
        [--device cuda] [--shard 0/12] [--out part-0.jsonl] [--prepare] [--merge part-*.jsonl]

Equal steps, equal data, equal start: the teacher's own samples (drawn once for each model and seed, kept in --work), or
the tokens of --train; the start is the post-training quantisation named by --start. Runs with the same seed see the
same batches, so that losses are compared in pairs. Rows without a loss are the baselines: rtn, mse and the start.

Judged on every 20th of CIFAR-10's 10,000 test images (500), teacher forced, no guidance: KL(fp‖student),
cross-entropy, top-1 and top-900 agreement, and KL of both distributions renormalised on the teacher's 900 most likely
tokens; denoisers by the squared output error on every 40th (250). FD of --fd generated images where asked. torch in
float32 on the CPU, or with --device cuda on a GPU, without TF32 and without checkpoints; a row says which.
Post-training quantisation is always done on the CPU, once for each model, scheme and method: what it found is kept in
--work.

One line of topkld_quality.jsonl a row, written when it is done; what is there is not measured again, and a training run
that was cut off goes on from its checkpoint. A row of other than the usual rates, running mean, samples or batch names
those that differ, and is another row. topkld_quality.md (`topkld_report.py`) and topkld_quality.csv are made of all
lines; --table makes them of the lines that are there and measures nothing. The data set is read, never copied.

--plan makes a list of sweeps (`topkld_jobs.py` says how it is written), shared by as many processes as are started with
one --work and an --out each; --stop-after begins no row later than that, in seconds. --shard I/N takes every N-th row
of those that are not in --known, from the I-th, with or without a plan. --prepare only makes what rows have in common,
starts and samples, in --work. --merge takes in what processes wrote, in place of rows that were there.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from shards import append, merged, read, save, shard_of
from topkld_bench import Bench, recipe_of
from topkld_jobs import (
    HEAD,
    LOSSES,
    SCHEMES,
    VARIED,
    Job,
    Sweep,
    claimed,
    jobs_of,
    key_of,
    rate_of,
    read_plan,
    sweep_of,
)

from qexport.distill import Distillation, DistillSettings, distill
from qexport.errors import InputError
from qexport.reference.device import choose_device, device_name
from qexport.verify.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def settings_of(job: Job) -> DistillSettings:
    """The same for every loss but the loss."""
    sweep, row = job.sweep, job.row
    loss = "forward" if row["loss"] not in LOSSES else row["loss"]  # a denoiser's is not a choice
    return DistillSettings(
        Distillation(loss, top_k=row["top_k"] or HEAD), steps=sweep.steps, seed=row["seed"],
        evaluate_every=max(1, sweep.steps // 8), checkpoint_every=50, **{name: job.setting(name) for name in VARIED},
    )  # fmt: skip


def measure(bench: Bench, job: Job, work: Path, device: str) -> dict[str, Any]:
    """The row of a job."""
    recipe = recipe_of(bench.plain, SCHEMES[job.row["scheme"]], job.row["start"])
    folded, solution, seconds = bench.start(recipe)
    if not job.trained:
        return {**job.row, **bench.figures(recipe, solution, job.sweep.fd), "wall_s": round(seconds, 1)}
    runs = work / "runs" if device == "cpu" else None  # a run of seconds is done again sooner
    samples = bench.samples(job.sweep, job.row["seed"])
    trained = distill(folded, recipe, solution, settings_of(job), data=samples, work=runs, device=device)
    report = trained.report
    names = ("start", "best", "best_step", "wall_s", "peak_memory_bytes", "peak_device_bytes")
    kept = {name: report[name] for name in names if name in report}
    quality = bench.figures(recipe, trained.solution, job.sweep.fd)
    return {**job.row, **quality, "held_out": kept, "wall_s": kept["wall_s"], "settings": report["settings"]}


def prepare(jobs: list[Job], shard: str | None, options: argparse.Namespace) -> None:
    """Make what several rows have in common, in --work: starts, and the samples of each seed."""
    common: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        common.setdefault((job.model, job.row["scheme"], job.row["start"]), job)
        if job.trained:
            common.setdefault((job.model, job.row["seed"], job.sweep.data, job.sweep.samples), job)
    bench: Bench | None = None
    for names in sorted(shard_of(list(common), shard), key=lambda names: names[0]):
        job = common[names]
        if bench is None or bench.name != job.model:
            bench = Bench(job.model, options)
        try:
            if len(names) == 3:
                _, _, seconds = bench.start(recipe_of(bench.plain, SCHEMES[job.row["scheme"]], job.row["start"]))
                print(*names, f"{seconds:.1f} s", flush=True)
            else:
                print(*names, bench.samples(job.sweep, job.row["seed"]).source, flush=True)
        except InputError as error:  # groups of 128 do not divide every width
            print(*names, f"failed: {error}", flush=True)


def make_rows(jobs: Iterable[Job], options: argparse.Namespace) -> None:
    """Measure and write row by row; what fails is told, and does not keep the others from being made."""
    shared = {
        "threads": options.threads, "device": device_name(options.device),
        "environment": describe_environment(options.device),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    bench: Bench | None = None
    for job in jobs:
        if options.stop_after and time.monotonic() - begin > options.stop_after:
            break
        try:
            if bench is None or bench.name != job.model:
                bench = None  # its predictions go before those of the next one come
                bench = Bench(job.model, options)
            row = measure(bench, job, options.work, options.device)
        except Exception as error:
            print(*job.row.values(), f"failed: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, InputError):  # one that diverged
                traceback.print_exc()
            continue
        append(options.out, row | shared)
        if options.device == "cuda":
            torch.cuda.empty_cache()  # others share the device
        figure = row.get("kl", row.get("output_mse"))
        print(*job.row.values(), figure, f"{row['wall_s']} s", flush=True)


def write_tables(path: Path) -> None:
    from topkld_report import as_csv, report  # wants SciPy, which measuring does not

    rows = read(path)
    path.with_suffix(".md").write_text(report(rows))
    path.with_suffix(".csv").write_text(as_csv(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--table", action="store_true", help="only make the tables of what has been measured")
    parser.add_argument("--train", type=Path, help="train on the tokens of these images, not on the teacher's samples")
    parser.add_argument("--models", nargs="+", default=["var-c10-d2", "var-c10-d3", "var-c10-d4"])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--top-k", nargs="+", type=int, default=[HEAD])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", nargs="+", type=rate_of, default=[VARIED["lr"]], help="relative rates of the weights")
    parser.add_argument("--scale-lr", nargs="+", type=rate_of, default=[VARIED["scale_lr"]], help="of the scales")
    parser.add_argument("--ema", nargs="+", type=float, default=[VARIED["ema"]], help="decays of a running mean")
    parser.add_argument(
        "--rest-lr", nargs="+", type=rate_of, default=[VARIED["rest_lr"]], help="relative rates of all that stays float"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=VARIED["batch"])
    parser.add_argument("--samples", type=int, default=VARIED["samples"])
    parser.add_argument("--start", default="gptq", help="post-training method where training starts")
    parser.add_argument("--fd", type=int, default=0, help="generated images for FD; 0 leaves it out")
    parser.add_argument("--plan", type=Path, help="a list of sweeps, which the options above are the defaults of")
    parser.add_argument("--stop-after", type=float, metavar="S", help="begin no row after so many seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="to train, judge and sample on")
    parser.add_argument("--shard", metavar="I/N", help="every N-th row from the I-th (from 0), of those not in --known")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="files with rows that are not made again")
    parser.add_argument("--prepare", action="store_true", help="only make what rows have in common, in --work")
    parser.add_argument("--list", action="store_true", help="only say how many rows each sweep has")
    parser.add_argument("--merge", type=Path, nargs="+", help="take in the rows of these files, and make the tables")
    parser.add_argument("--work", type=Path, default=Path("qexport-out") / "topkld-work", help="samples, checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS / "topkld_quality.jsonl")
    options = parser.parse_args()
    if options.merge:
        save(options.out, merged([row for path in options.merge for row in read(path)], read(options.out), key_of))
    if options.merge or options.table:
        write_tables(options.out)
        return
    if options.images is None and not (options.prepare or options.list):
        parser.error("--images is needed, unless --table, --merge, --prepare or --list")
    given = {field.name: getattr(options, field.name) for field in fields(Sweep) if hasattr(options, field.name)}
    sweeps = read_plan(options.plan, given) if options.plan else [sweep_of(given)]
    measured = [] if options.prepare or options.list else [options.out]
    known = {key_of(row) for path in (*options.known, *measured) for row in read(path)}
    jobs = [job for job in jobs_of(sweeps) if key_of(job.row) not in known]
    if options.list:
        for number in range(len(sweeps)):
            print(number, sum(job.stage == number for job in jobs))
        return
    torch.set_num_threads(options.threads)
    choose_device(options.device, "--device")
    if options.prepare:
        prepare(jobs, options.shard, options)
        return
    mine = shard_of(jobs, options.shard)
    make_rows(claimed(mine, options.work / "claims") if options.plan else mine, options)
    if options.shard is None and options.plan is None:
        write_tables(options.out)


if __name__ == "__main__":
    main()
