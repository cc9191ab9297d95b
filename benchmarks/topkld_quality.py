"""Every loss on every scheme with several seeds: what distillation makes of the reference models, in one table.

    python benchmarks/topkld_quality.py --images cifar_test.npz [--models var-c10-d2 …] [--schemes W2 …]
        [--losses forward split …] [--top-k 900 …] [--seeds 0 1 2] [--steps 400] [--start mse] [--train FILE]
        [--device cuda] [--shard 0/12 --out part-0.jsonl] [--prepare] [--merge part-*.jsonl]

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
that was cut off goes on from its checkpoint. The tables, topkld_quality.md, are made of all lines (`topkld_tables.py`);
--table makes them of the lines that are there and measures nothing. The data set is read, never copied.

--shard I/N takes every N-th row of those that are not in --known, from the I-th, so that N processes with an --out each
share a device; --prepare only makes what they have in common in --work; --merge takes in what they wrote.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shards import append, merged, read, save, shard_of

from qexport.compare import Judge, make_judge
from qexport.distill import TOPK_LOSSES, Distillation, DistillSettings, Samples, distill, drawn_latents, drawn_tokens
from qexport.distill import image_tokens as tokens_of_images
from qexport.errors import InputError
from qexport.family import Generator, find_model
from qexport.formats import get_format
from qexport.methods import parse_method
from qexport.recipe import Recipe, recipe_for
from qexport.reference import apply_folds, torch_player
from qexport.reference.device import choose_device, device_name, placed, to_device
from qexport.reference.twin import quantised_twin
from qexport.scheme import ActivationSpec, PerGroup, Scheme, Static, TensorSpec, preset
from qexport.solution import Solution
from qexport.solve import solve
from qexport.totals import layer_row, totals
from qexport.verify.environment import describe_environment
from qexport.verify.fd import measure_fd
from qexport.verify.images import open_images
from qexport.verify.quality import tokens_of, torch_logits
from qexport.verify.trajectory import label_inputs, labels_for

RESULTS = Path(__file__).parent / "results"
EVERY = {"var": 20, "dit": 40}
HEAD = 900
"""Tokens of the figures that look at the teacher's most likely ones: what the published sampler draws from."""

BATCH = 25
NO_LOSS = "none"
FD_BATCH = {"var": 100, "dit": 500}
"""Images sampled at once on a GPU: the logits of 100 at VAR's last scale take 210 MB, several times over."""


def _ternary(size: int) -> Scheme:
    return Scheme(TensorSpec(get_format("ternary"), PerGroup(size)), None)


def _with_activations(wbits: int, name: str) -> Scheme:
    return Scheme(preset(wbits).weight, ActivationSpec(get_format(name), Static()))


SCHEMES: dict[str, Scheme] = {
    "ternary": _ternary(32), "W2": preset(2), "W3": preset(3), "W4": preset(4),
    "ternary g128": _ternary(128), "W2 g128": preset(2, group_size=128), "W3 g128": preset(3, group_size=128),
    "W4 g128": preset(4, group_size=128), "W2A8": _with_activations(2, "int8"), "W4A4": _with_activations(4, "int4"),
}  # fmt: skip
LOSSES = ("forward", "split", "mixed", "boosted", "reverse", "js", "logit-mse", "cross-entropy")
BASELINES = ("rtn", "mse")


class Bench:
    """One model, on the CPU and where it computes: its judge, its test tokens, and the samples of each seed."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        family, entry = find_model(name)
        self.plain: Generator = family.load(entry, None, None)
        self.full = placed(self.plain, options.device)
        self.name, self.device, self.images = name, options.device, options.images
        self.work, self.count, self.train = options.work, options.samples, options.train

    @cached_property
    def judge(self) -> Judge:
        """On the test images."""
        return make_judge(self.full, images=self.images, every=EVERY[self.plain.entry.family])

    @cached_property
    def batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Labels and tokens of the test images; none where the model has no tokens."""
        entry = self.plain.entry
        if self.plain.quality is None:
            return []
        every = EVERY[entry.family]
        given = open_images(self.images, size=entry.image_size, num_classes=entry.num_classes, every=every)
        return list(tokens_of(self.full, given, BATCH))

    def samples(self, seed: int) -> Samples:
        """What the teacher draws with that seed, or the tokens of the training images."""
        source = "drawn" if self.train is None else self.train.stem
        path = self.work / f"{self.name}-{source}-{self.count}-{seed}.pt"
        if not path.exists():
            found = self._make(seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save({"tensors": list(found.tensors), "source": found.source}, partial)
            partial.replace(path)
        state = torch.load(path, weights_only=True)
        return Samples(tuple(state["tensors"]), state["source"])

    def _make(self, seed: int) -> Samples:
        if self.plain.denoise is not None:
            return drawn_latents(self.full, self.count, seed, 10)
        if self.train is None:
            return drawn_tokens(self.full, self.count, seed)
        entry = self.plain.entry
        images = open_images(self.train, size=entry.image_size, num_classes=entry.num_classes)
        order = np.random.default_rng(seed).permutation(len(images))[: self.count]
        chosen = replace(images, load=lambda i: images.load(int(order[i])), labels=images.labels[order])
        return tokens_of_images(self.plain, chosen.batches(BATCH), f"{self.count} images of {self.train.name}")

    def start(self, recipe: Recipe) -> tuple[Generator, Solution, float]:
        """The folded model and the solution of post-training quantisation, and the seconds of whoever found it."""
        folded = copy.deepcopy(self.plain)
        text = recipe.to_toml()  # schemes may share a name: W2 and ternary do
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self.work / "starts" / f"{self.name}-{recipe.name}-{digest}.pickle"
        if not path.exists():
            begin = time.perf_counter()
            found = solve(copy.deepcopy(self.plain), recipe), time.perf_counter() - begin
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(pickle.dumps(found))
            partial.replace(path)
        solution, seconds = pickle.loads(path.read_bytes())
        apply_folds(folded, solution.smooth)
        return folded, solution, seconds

    def figures(self, recipe: Recipe, solution: Solution, fd: int) -> dict[str, Any]:
        """Quality and size of a solution."""
        rows: list[dict[str, Any]] = []
        twin = quantised_twin(self.plain, recipe, solution, lambda weight: rows.append(layer_row(weight))).quantised
        to_device(twin, self.device)
        found = dict(self.judge(twin, bool(solution.activations)))
        found.pop("seed", None)  # the judge's; a row has that of training
        if "loss" in found:  # a row's is what was minimised
            found["ddpm_loss"] = found.pop("loss")
        if self.batches and not solution.activations:
            found |= self._heads(twin)
        if fd:
            found["fd"] = self._frechet(twin, fd)
        summed = totals(rows)
        found["bits_per_weight"] = summed["bits_per_weight_quantized"]
        found["information_bits_per_weight"] = summed["information_bits_per_weight_quantized"]
        return found

    def _heads(self, twin: Generator) -> dict[str, float]:
        """Agreement of the 900 most likely tokens, and KL renormalised on the teacher's."""
        shared = kl = positions = 0.0
        teacher, student = torch_logits(self.full), torch_logits(twin)
        for labels, tokens in self.batches:
            p, q = (model(labels, tokens) for model in (teacher, student))
            head = p.topk(HEAD, sorted=False)
            mask = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, head.indices, True)
            shared += float(mask.gather(-1, q.topk(HEAD, sorted=False).indices).sum()) / HEAD
            log_p, log_q = head.values.log_softmax(-1), q.gather(-1, head.indices).log_softmax(-1)
            kl += float((log_p.exp() * (log_p - log_q)).double().sum())
            positions += tokens.size
        return {"top900_agreement": shared / positions, "kl_top900": kl / positions}

    def _frechet(self, twin: Generator, count: int) -> dict[str, Any]:
        assert twin.features is not None
        player, labels = torch_player(twin), labels_for(count, twin.entry.num_classes)
        size = 50 if self.device == "cpu" else FD_BATCH[twin.entry.family]
        batches = (
            player.play(label_inputs(twin.plan, labels[i : i + size]), seed=0, first_index=i)
            for i in range(0, count, size)
        )
        return measure_fd(batches, twin.features, 0, self.device).to_json()


def settings_of(loss: str, top_k: int, seed: int, options: argparse.Namespace) -> DistillSettings:
    """The same for every loss but the loss."""
    return DistillSettings(
        Distillation(loss, top_k=top_k), steps=options.steps, batch=options.batch, seed=seed,
        samples=options.samples, evaluate_every=max(1, options.steps // 8), checkpoint_every=50,
    )  # fmt: skip


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("model", "scheme", "start", "loss", "top_k", "seed", "steps", "data"))


def recipe_of(plain: Generator, scheme: Scheme, method: str) -> Recipe:
    parsed = parse_method(method)
    return recipe_for(scheme, plain.default_layers, f"{scheme.name}-{method}", parsed.algorithm, parsed.smooth)


@dataclass(frozen=True)
class Job:
    """A row to be: what names it, and what it is made by. Without a `loss` it is a baseline."""

    row: Mapping[str, Any]
    method: str
    seed: int = 0
    top_k: int | None = None

    @property
    def loss(self) -> str:
        """As in the row."""
        return self.row["loss"]


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """All rows that are asked for, in order."""
    data = "teacher" if options.train is None else options.train.stem
    for model in options.models:
        losses = ["output-mse"] if find_model(model)[1].family == "dit" else options.losses
        for title in options.schemes:
            for method in dict.fromkeys((*BASELINES, options.start)):
                yield Job({"model": model, "scheme": title, "start": method, "loss": NO_LOSS, "data": None}, method)
            for seed in options.seeds:
                for loss in losses:
                    for top_k in options.top_k if loss in TOPK_LOSSES else (None,):
                        row = {
                            "model": model, "scheme": title, "start": options.start, "loss": loss, "top_k": top_k,
                            "seed": seed, "steps": options.steps, "data": data,
                        }  # fmt: skip
                        yield Job(row, options.start, seed, top_k)


def measure(bench: Bench, job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a job."""
    recipe = recipe_of(bench.plain, SCHEMES[job.row["scheme"]], job.method)
    folded, solution, seconds = bench.start(recipe)
    if job.loss == NO_LOSS:
        return {**job.row, **bench.figures(recipe, solution, options.fd), "wall_s": round(seconds, 1)}
    asked = "forward" if bench.plain.denoise is not None else job.loss
    settings = settings_of(asked, job.top_k or HEAD, job.seed, options)
    work = options.work / "runs" if options.device == "cpu" else None  # a run of seconds is done again sooner
    trained = distill(
        folded, recipe, solution, settings, data=bench.samples(job.seed), work=work, device=options.device
    )  # fmt: skip
    report = trained.report
    names = ("start", "best", "best_step", "wall_s", "peak_memory_bytes", "peak_device_bytes")
    kept = {name: report[name] for name in names if name in report}
    quality = bench.figures(recipe, trained.solution, options.fd)
    return {**job.row, **quality, "held_out": kept, "wall_s": kept["wall_s"], "settings": report["settings"]}


def prepare(jobs: list[Job], options: argparse.Namespace) -> None:
    """Make what several rows have in common, in --work: starts, and the samples of each seed."""
    common = dict.fromkeys((job.row["model"], job.row["scheme"], job.method) for job in jobs)
    bench: Bench | None = None
    for model, title, method in shard_of(list(common), options.shard):
        bench = bench if bench is not None and bench.name == model else Bench(model, options)
        _, _, seconds = bench.start(recipe_of(bench.plain, SCHEMES[title], method))
        print(model, title, method, f"{seconds:.1f} s", flush=True)
    drawn = dict.fromkeys((job.row["model"], job.seed) for job in jobs if job.loss != NO_LOSS)
    for model, seed in shard_of(list(drawn), options.shard):
        bench = bench if bench is not None and bench.name == model else Bench(model, options)
        print(model, seed, bench.samples(seed).source, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    from topkld_tables import levels_table, pairs_table  # wants SciPy, which measuring does not

    elsewhere = sorted({row["device"] for row in rows if row.get("device", "cpu") != "cpu"})
    lines = [
        "# What distillation makes of the reference models",
        "",
        "Made by `python benchmarks/topkld_quality.py` (its header says how everything is measured) from",
        "`topkld_quality.jsonl`. Block matrices only; 500 test images (DiT: 250). Seconds are those of training.",
        *(
            [f"Rows with † were trained and judged on {', '.join(elsewhere)}, the others on a CPU."]
            if elsewhere
            else []
        ),
        "",
        "| model | scheme | start | loss | K | seed | steps | KL (DiT: output error) | KL on top-900 | CE | top-1 "
        "| top-900 | bits | s | peak MB |",
        "|" + "---|" * 15,
    ]

    def cell(row: Mapping[str, Any], name: str, digits: int = 4) -> str:
        return f"{row[name]:.{digits}f}" if row.get(name) is not None else ""

    order = list(SCHEMES)
    for row in sorted(rows, key=lambda r: (r["model"], order.index(r["scheme"]), str(r.get("data") or ""))):
        figure = cell(row, "kl") if "kl" in row else cell(row, "output_mse", 5)
        peak = row.get("held_out", {}).get("peak_memory_bytes")
        mark = "" if row.get("device", "cpu") == "cpu" else " †"
        cells = [
            row["model"], row["scheme"], row["start"], row["loss"], str(row.get("top_k") or ""),
            str(row.get("seed", "")), str(row.get("steps", "")), figure, cell(row, "kl_top900"),
            cell(row, "cross_entropy"), cell(row, "top1_agreement", 3), cell(row, "top900_agreement", 3),
            cell(row, "information_bits_per_weight", 2), cell(row, "wall_s", 0) + mark,
            f"{peak / 1e6:.0f}" if peak else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *pairs_table(rows), *levels_table(rows)]
    return "\n".join(lines).rstrip() + "\n"


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
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--start", default="gptq", help="post-training method where training starts")
    parser.add_argument("--fd", type=int, default=0, help="generated images for FD; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="to train, judge and sample on")
    parser.add_argument("--shard", metavar="I/N", help="every N-th row from the I-th (from 0), of those not in --known")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="files with rows that are not made again")
    parser.add_argument("--prepare", action="store_true", help="only make what rows have in common, in --work")
    parser.add_argument("--merge", type=Path, nargs="+", help="take in the rows of these files, and make the tables")
    parser.add_argument("--work", type=Path, default=Path("qexport-out") / "topkld-work", help="samples, checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS / "topkld_quality.jsonl")
    options = parser.parse_args()
    if options.merge:
        rows = merged(read(options.out), [row for path in options.merge for row in read(path)], key_of)
        save(options.out, rows)
    if options.merge or options.table:
        options.out.with_suffix(".md").write_text(table(read(options.out)))
        return
    if options.images is None and not options.prepare:
        parser.error("--images is needed, unless --table, --merge or --prepare")
    torch.set_num_threads(options.threads)
    choose_device(options.device, "--device")
    known = {key_of(row) for path in options.known for row in read(path)}
    jobs = [job for job in jobs_of(options) if key_of(job.row) not in known]
    if options.prepare:
        prepare(jobs, options)
        return
    shared = {
        "threads": options.threads, "device": device_name(options.device),
        "environment": describe_environment(options.device),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench: Bench | None = None
    for job in shard_of(jobs, options.shard):
        if key_of(job.row) in {key_of(row) for row in read(options.out)}:
            continue
        if bench is None or bench.name != job.row["model"]:
            bench = Bench(job.row["model"], options)
        try:
            row = measure(bench, job, options)
        except InputError as error:  # one that diverged does not keep the others from being made
            print(*job.row.values(), f"failed: {error}", flush=True)
            continue
        append(options.out, row | shared)
        figure = row.get("kl", row.get("output_mse"))
        print(*job.row.values(), figure, f"{row['wall_s']} s", flush=True)
    if options.shard is None:
        options.out.with_suffix(".md").write_text(table(read(options.out)))


if __name__ == "__main__":
    main()
