"""Every loss on every scheme with several seeds: what distillation makes of the reference models, in one table.

    python benchmarks/topkld_quality.py --images cifar_test.npz [--models var-c10-d2 …] [--schemes W2 …]
        [--losses forward split …] [--top-k 900 …] [--seeds 0 1 2] [--steps 400] [--start mse] [--train FILE]

Equal steps, equal data, equal start: the teacher's own samples (drawn once for each model and seed, kept in --work), or
the tokens of --train; the start is the post-training quantisation named by --start. Runs with the same seed see the
same batches, so that losses are compared in pairs. Rows without a loss are the baselines: rtn, mse and the start.

Judged on every 20th of CIFAR-10's 10,000 test images (500), teacher forced, no guidance: KL(fp‖student),
cross-entropy, top-1 and top-900 agreement, and KL of both distributions renormalised on the teacher's 900 most likely
tokens; denoisers by the squared output error on every 40th (250). FD of --fd generated images where asked. torch on the
CPU in float32.

One line of topkld_quality.jsonl a row, written when it is done; what is there is not measured again, and a training run
that was cut off goes on from its checkpoint. The tables, topkld_quality.md, are made of all lines (`topkld_tables.py`);
--table makes them of the lines that are there and measures nothing. The data set is read, never copied.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from topkld_tables import levels_table, pairs_table

from qexport.compare import make_judge
from qexport.distill import TOPK_LOSSES, Distillation, DistillSettings, Samples, distill, drawn_latents, drawn_tokens
from qexport.distill import image_tokens as tokens_of_images
from qexport.family import Generator, find_model
from qexport.formats import get_format
from qexport.methods import parse_method
from qexport.quantize import stored_weights
from qexport.recipe import Recipe, recipe_for
from qexport.reference import torch_player
from qexport.reference.twin import quantised_twin
from qexport.scheme import ActivationSpec, PerGroup, Scheme, Static, TensorSpec, preset
from qexport.solution import Solution
from qexport.solve import solve
from qexport.totals import layer_row, totals
from qexport.verify.environment import describe_environment
from qexport.verify.fd import measure_fd
from qexport.verify.images import open_images
from qexport.verify.quality import tokens_of, torch_student
from qexport.verify.trajectory import label_inputs, labels_for

RESULTS = Path(__file__).parent / "results"
EVERY = {"var": 20, "dit": 40}
HEAD = 900
"""Tokens of the figures that look at the teacher's most likely ones: what the published sampler draws from."""

BATCH = 25
NO_LOSS = "none"


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
    """One model: its judge, its test tokens, and the samples of each seed."""

    def __init__(self, name: str, images: Path, work: Path, samples: int, train: Path | None) -> None:
        family, entry = find_model(name)
        self.plain: Generator = family.load(entry, None, None)
        self.name, self.work, self.count, self.train = name, work, samples, train
        self.judge = make_judge(self.plain, images=images, every=EVERY[entry.family])
        self.batches: list[tuple[np.ndarray, np.ndarray]] = []
        if self.plain.quality is not None:
            given = open_images(images, size=entry.image_size, num_classes=entry.num_classes, every=EVERY[entry.family])
            self.batches = list(tokens_of(self.plain, given, BATCH))

    def samples(self, seed: int) -> Samples:
        """What the teacher draws with that seed, or the tokens of the training images."""
        source = "drawn" if self.train is None else self.train.stem
        path = self.work / f"{self.name}-{source}-{self.count}-{seed}.pt"
        if not path.exists():
            found = self._make(seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"tensors": list(found.tensors), "source": found.source}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        state = torch.load(path, weights_only=True)
        return Samples(tuple(state["tensors"]), state["source"])

    def _make(self, seed: int) -> Samples:
        if self.plain.denoise is not None:
            return drawn_latents(self.plain, self.count, seed, 10)
        if self.train is None:
            return drawn_tokens(self.plain, self.count, seed)
        entry = self.plain.entry
        images = open_images(self.train, size=entry.image_size, num_classes=entry.num_classes)
        order = np.random.default_rng(seed).permutation(len(images))[: self.count]
        chosen = replace(images, load=lambda i: images.load(int(order[i])), labels=images.labels[order])
        return tokens_of_images(self.plain, chosen.batches(BATCH), f"{self.count} images of {self.train.name}")

    def start(self, recipe: Recipe) -> tuple[Generator, Solution, float]:
        """The folded model and the solution of post-training quantisation, and its seconds."""
        begin = time.perf_counter()
        folded = copy.deepcopy(self.plain)
        solution = solve(folded, recipe)
        return folded, solution, time.perf_counter() - begin

    def figures(self, recipe: Recipe, solution: Solution, fd: int) -> dict[str, Any]:
        """Quality and size of a solution."""
        twin = quantised_twin(self.plain, recipe, solution).quantised
        found = dict(self.judge(twin, bool(solution.activations)))
        found.pop("seed", None)  # the judge's; a row has that of training
        if self.batches and not solution.activations:
            found |= self._heads(twin)
        if fd:
            found["fd"] = self._frechet(twin, fd)
        folded = copy.deepcopy(self.plain)
        if solution.smooth:
            from qexport.reference import apply_folds

            apply_folds(folded, solution.smooth)
        summed = totals([layer_row(weight) for weight in stored_weights(folded, recipe, solution)])
        found["bits_per_weight"] = summed["bits_per_weight_quantized"]
        found["information_bits_per_weight"] = summed["information_bits_per_weight_quantized"]
        return found

    def _heads(self, twin: Generator) -> dict[str, float]:
        """Agreement of the 900 most likely tokens, and KL renormalised on the teacher's."""
        shared = kl = positions = 0.0
        teacher, student = torch_student(self.plain), torch_student(twin)
        for labels, tokens in self.batches:
            p, q = (
                torch.from_numpy(np.concatenate(list(model(labels, tokens)), axis=1)) for model in (teacher, student)
            )
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
        batches = (
            player.play(label_inputs(twin.plan, labels[i : i + 50]), seed=0, first_index=i) for i in range(0, count, 50)
        )
        return measure_fd(batches, twin.features, 0).to_json()


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


def measure(model: str, options: argparse.Namespace, done: Callable[[], set], write: Callable[[dict], None]) -> None:
    """All rows of a model that are not there yet."""
    bench = Bench(model, options.images, options.work, options.samples, options.train)
    data = "teacher" if options.train is None else options.train.stem
    losses = ["output-mse"] if bench.plain.denoise is not None else options.losses
    for title in options.schemes:
        scheme = SCHEMES[title]
        for method in dict.fromkeys((*BASELINES, options.start)):
            row = {"model": model, "scheme": title, "start": method, "loss": NO_LOSS, "data": None}
            if key_of(row) not in done():
                recipe = recipe_of(bench.plain, scheme, method)
                _, solution, seconds = bench.start(recipe)
                write(row | bench.figures(recipe, solution, options.fd) | {"wall_s": round(seconds, 1)})
        recipe = recipe_of(bench.plain, scheme, options.start)
        found: tuple[Generator, Solution, float] | None = None
        for seed in options.seeds:
            for loss in losses:
                for top_k in options.top_k if loss in TOPK_LOSSES else (None,):
                    row = {
                        "model": model, "scheme": title, "start": options.start, "loss": loss, "top_k": top_k,
                        "seed": seed, "steps": options.steps, "data": data,
                    }  # fmt: skip
                    if key_of(row) in done():
                        continue
                    found = found or bench.start(recipe)
                    asked = "forward" if bench.plain.denoise is not None else loss
                    settings = settings_of(asked, top_k or HEAD, seed, options)
                    trained = distill(
                        found[0], recipe, found[1], settings, data=bench.samples(seed), work=options.work / "runs"
                    )
                    report = trained.report
                    kept = {
                        name: report[name] for name in ("start", "best", "best_step", "wall_s", "peak_memory_bytes")
                    }
                    quality = bench.figures(recipe, trained.solution, options.fd)
                    write(row | quality | {"held_out": kept, "wall_s": kept["wall_s"], "settings": report["settings"]})


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What distillation makes of the reference models",
        "",
        "Made by `python benchmarks/topkld_quality.py` (its header says how everything is measured) from",
        "`topkld_quality.jsonl`. Block matrices only; 500 test images (DiT: 250). Seconds are those of training.",
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
        cells = [
            row["model"], row["scheme"], row["start"], row["loss"], str(row.get("top_k") or ""),
            str(row.get("seed", "")), str(row.get("steps", "")), figure, cell(row, "kl_top900"),
            cell(row, "cross_entropy"), cell(row, "top1_agreement", 3), cell(row, "top900_agreement", 3),
            cell(row, "information_bits_per_weight", 2), cell(row, "wall_s", 0), f"{peak / 1e6:.0f}" if peak else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *pairs_table(rows), *levels_table(rows)]
    return "\n".join(lines).rstrip() + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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
    parser.add_argument("--work", type=Path, default=Path("qexport-out") / "topkld-work", help="samples, checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS / "topkld_quality.jsonl")
    options = parser.parse_args()
    if options.table:
        options.out.with_suffix(".md").write_text(table(read(options.out)))
        return
    if options.images is None:
        parser.error("--images is needed, unless --table")
    torch.set_num_threads(options.threads)
    environment = describe_environment("cpu")

    def write(row: dict[str, Any]) -> None:
        line = json.dumps(row | {"threads": options.threads, "environment": environment})
        with options.out.open("a") as file:
            file.write(line + "\n")
        figure = row.get("kl", row.get("output_mse"))
        print(*(row.get(name) for name in ("model", "scheme", "start", "loss", "top_k", "seed")), figure, flush=True)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        measure(model, options, lambda: {key_of(row) for row in read(options.out)}, write)
    options.out.with_suffix(".md").write_text(table(read(options.out)))


if __name__ == "__main__":
    main()
