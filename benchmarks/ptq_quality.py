"""Every scheme by every method on the reference models: quality, bits, time and memory, in one table.

    python benchmarks/ptq_quality.py --images cifar_test.npz [--models var-c10-d2 …] [--schemes W4 …] [--fd 1000]
    python benchmarks/ptq_quality.py --fd-only [--device cuda] [--shard 0/12 --shard-out part-0.jsonl]
    python benchmarks/ptq_quality.py --merge part-*.jsonl

VAR: KL to the full-precision model, top-1 agreement and cross-entropy on every 20th of CIFAR-10's 10,000 test images
(500), teacher forced, no guidance. DiT: squared output error on every 40th (250), relative to the full-precision
output, and relative L2 of the final latents of 20 trajectories. Calibration: 64 images that the model draws itself,
seed 0 (DiT: by ddim-25). torch on the CPU in float32. Peak memory is that of the process while it calibrates and
rounds, model and reference included (Linux only). `load_average` is stated with every row: only rows of a quiet machine
are good for their seconds.

One line of ptq_quality.jsonl a row, written when it is done; what is there is not measured again, so a run can be
interrupted. The table, ptq_quality.md, is made of all lines. The data set is read, never copied.

--fd-only solves the rows that have no FD once more, samples from them, and adds FD and where it was sampled
(``fd_device``) to the row, whose other figures stay. --device says where models are judged and sampled from, without
TF32; calibration and rounding are always the CPU's. --shard I/N takes every N-th missing row from the I-th and writes
it to a file of its own, --shard-out; --merge takes such files in. --from-scaling takes FD from results of `qexport
scaling`, where recipe and error are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from shards import append, read, save, shard_of

from qexport.compare import Judge, make_judge
from qexport.errors import QexportError
from qexport.family import FeatureExtractor, Generator, find_model
from qexport.formats import get_format
from qexport.methods import parse_method
from qexport.recipe import Calibration, Recipe, Rule
from qexport.reference import torch_player
from qexport.reference.device import choose_device, device_name, placed, to_device
from qexport.reference.twin import quantised_twin
from qexport.scheme import (
    DEFAULT_GROUP_SIZE,
    ActivationSpec,
    PerGroup,
    PerStep,
    PerToken,
    Scheme,
    Static,
    TensorSpec,
    preset,
)
from qexport.solve import solve
from qexport.totals import layer_row, totals
from qexport.verify.denoise_quality import Trajectories, play_trajectories, trajectory_quality
from qexport.verify.environment import describe_environment
from qexport.verify.fd import measure_fd
from qexport.verify.trajectory import label_inputs, labels_for

RESULTS = Path(__file__).parent / "results"
MODELS = tuple(f"{family}-c10-d{depth}" for family in ("var", "dit") for depth in (2, 3, 4))
EVERY = {"var": 20, "dit": 40}
TRAJECTORIES = 20
BATCH = 12
"""Images sampled at once on a CPU: noise and draws are by image, and activations of 12 stay in the cache."""

FD_BATCH = {"var": 100, "dit": 500}
"""Images sampled at once on a GPU: the logits of 100 at VAR's last scale take 210 MB, several times over."""

FD_IMAGES = 1000
"""Of --fd-only."""

OF_SCALING = {
    "int8": "W8", "int6": "W6", "int4": "W4", "int3": "W3", "int2": "W2", "fp8-e4m3": "fp8 weights",
    "fp6-e3m2": "fp6-e3m2 weights", "fp4-e2m1": "fp4 weights",
}  # fmt: skip
"""Formats of `qexport scaling` by what they are called here."""

SAME = 0.1

CALIBRATION = {"var": Calibration(64), "dit": Calibration(64, schedule="ddim-25")}
INT8 = get_format("int8")

WEIGHT_METHODS = ("rtn", "mse", "gptq", "awq", "smoothquant", "smoothquant+gptq", "awq+gptq")
ACTIVATION_METHODS = ("rtn", "gptq", "smoothquant", "smoothquant+gptq")


GROUPS = PerGroup(DEFAULT_GROUP_SIZE)


def _weights(number_format: str) -> Scheme:
    """Weights in a study format, in groups of 32."""
    return Scheme(TensorSpec(get_format(number_format), GROUPS), None)


def _int8(scales: Static | PerStep | PerToken, wbits: int = 8, **options: Any) -> Scheme:
    return Scheme(preset(wbits).weight, ActivationSpec(INT8, scales, **options))


def _fp8(scales: Static | PerStep | PerToken) -> Scheme:
    return Scheme(preset(8, number_format="fp8").weight, ActivationSpec(get_format("fp8-e4m3"), scales))


SCHEMES: dict[str, tuple[Scheme, tuple[str, ...]]] = {
    "W4": (preset(4), WEIGHT_METHODS),
    "W3": (preset(3), WEIGHT_METHODS),
    "W2": (preset(2), WEIGHT_METHODS),
    "W8": (preset(8), ("rtn", "mse", "gptq")),
    "W6": (preset(6), ("rtn", "mse", "gptq")),
    "W4 g64": (preset(4, group_size=64), ("rtn", "mse", "gptq")),
    "ternary": (_weights("ternary"), ("ternary", "gptq")),
    "fp8 weights": (preset(8, number_format="fp8"), ("rtn", "mse", "gptq")),
    "fp8-e5m2 weights": (preset(8, number_format="fp8-e5m2"), ("rtn", "mse", "gptq")),
    "W8A8 absmax": (_int8(Static(), observer="minmax"), ("rtn",)),
    "W8A8 static": (_int8(Static()), ACTIVATION_METHODS),
    "W8A8 static, zero point": (_int8(Static(), symmetric=False), ("rtn", "gptq")),
    "W8A8 per step": (_int8(PerStep()), ("rtn", "smoothquant")),
    "W8A8 per token": (_int8(PerToken()), ("rtn", "gptq", "smoothquant")),
    "W8A8 fp8 static": (_fp8(Static()), ("rtn", "mse", "gptq", "smoothquant+gptq")),
    "W8A8 fp8 per token": (_fp8(PerToken()), ("rtn", "gptq")),
    "W4A8 static": (_int8(Static(), 4), ("rtn", "gptq", "smoothquant+gptq")),
    "W4A8 per token": (_int8(PerToken(), 4), ("rtn", "gptq")),
    "fp6-e3m2 weights": (_weights("fp6-e3m2"), ("rtn", "mse")),
    "fp6-e2m3 weights": (_weights("fp6-e2m3"), ("rtn", "mse")),
    "fp4 weights": (_weights("fp4-e2m1"), ("rtn", "mse", "gptq")),
}  # fmt: skip


class Bench:
    """One model, on the CPU and where it is judged, its judge, and what the full-precision model does."""

    def __init__(self, name: str, images: Path | None, fd: int, device: str) -> None:
        family, entry = find_model(name)
        self.plain = family.load(entry, None, None)
        self.full = placed(self.plain, device)
        self.name, self.fd, self.calibration = name, fd, CALIBRATION[entry.family]
        self.images, self.device = images, device

    @cached_property
    def judge(self) -> Judge:
        """On the test images."""
        return make_judge(self.full, images=self.images, every=EVERY[self.plain.entry.family])

    @cached_property
    def drawn(self) -> Trajectories | None:
        """Of a denoiser at full precision."""
        return None if self.plain.denoise is None else self.trajectories(self.full)

    def trajectories(self, generator: Generator) -> Trajectories:
        """What a denoiser samples."""
        assert generator.denoise is not None
        labels = labels_for(TRAJECTORIES, generator.entry.num_classes)
        return play_trajectories(torch_player(generator), generator.denoise, labels)

    def recipe(self, scheme: Scheme, method: str) -> Recipe:
        """The scheme by the method, on the block matrices."""
        parsed = parse_method(method)
        assert scheme.weight is not None
        rules = [
            Rule(layers, scheme.weight, parsed.algorithm, parsed.smooth, scheme.activation)
            for layers in self.plain.default_layers
        ]
        return Recipe(f"{scheme.name}-{method}", tuple(rules), calibration=self.calibration)

    def row(self, title: str, scheme: Scheme, method: str) -> dict[str, Any]:
        """One line of the results."""
        _ = self.judge, self.drawn  # before the clock starts
        recipe = self.recipe(scheme, method)
        forget_peak()
        start_s = time.perf_counter()
        solution = solve(copy.deepcopy(self.plain), recipe)
        rows: list[dict[str, Any]] = []
        twin = quantised_twin(self.plain, recipe, solution, lambda weight: rows.append(layer_row(weight))).quantised
        solve_s, peak = time.perf_counter() - start_s, peak_bytes()
        summed = totals(rows)
        to_device(twin, self.device)
        start_s = time.perf_counter()
        figures = dict(self.judge(twin, bool(solution.activations)))
        judge_s = time.perf_counter() - start_s
        figures.pop("per_scale", None)
        figures.pop("per_range", None)
        if self.drawn is not None:
            quality = trajectory_quality(self.drawn, self.trajectories(twin))
            figures["trajectory_error"] = quality.trajectory_error
        if self.fd:
            figures |= self.frechet(twin)
        return {
            "model": self.name,
            "scheme": title,
            "method": method,
            "scheme_name": scheme.name,
            **figures,
            "bits_per_weight": summed["bits_per_weight_quantized"],
            "information_bits_per_weight": summed["information_bits_per_weight_quantized"],
            "solve_s": round(solve_s, 2),
            "judge_s": round(judge_s, 2),
            "peak_memory_bytes": peak,
            "load_average": os.getloadavg()[0],
            "calibration": self.calibration.to_json(),
            "device": device_name(self.device),
        }

    def fd_of(self, scheme: Scheme, method: str) -> dict[str, Any]:
        """What `frechet` gives of the scheme by the method."""
        recipe = self.recipe(scheme, method)
        solution = solve(copy.deepcopy(self.plain), recipe)
        return self.frechet(to_device(quantised_twin(self.plain, recipe, solution).quantised, self.device))

    def frechet(self, generator: Generator) -> dict[str, Any]:
        """FD of images that the quantised model samples in torch, and where it did."""
        extractor: FeatureExtractor | None = generator.features
        assert extractor is not None
        player, labels = torch_player(generator), labels_for(self.fd, generator.entry.num_classes)
        size = BATCH if self.device == "cpu" else FD_BATCH[generator.entry.family]
        batches = (
            player.play(label_inputs(generator.plan, labels[i : i + size]), seed=0, first_index=i)
            for i in range(0, self.fd, size)
        )
        found = measure_fd(batches, extractor, 0, self.device).to_json()
        return {"fd": found, "fd_device": device_name(self.device)}


def forget_peak() -> None:
    """Make the kernel's high-water mark of resident memory start anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(rows: list[dict[str, Any]]) -> str:
    elsewhere = sorted({where for row in rows for where in (row.get("device"), row.get("fd_device")) if _away(where)})
    lent = sum("from" in row.get("fd", ()) for row in rows)
    lines = [
        "# Post-training quantisation of the reference models",
        "",
        "Made by `python benchmarks/ptq_quality.py --images cifar_test.npz` (its header says how everything is",
        "measured); every line of `ptq_quality.jsonl` is a row here. Block matrices are quantised, nothing else. Bits",
        "per quantised weight include scales, as stored / as information. FD: FeatureNet, 95 % bootstrap interval,",
        f"{lent} of them from `scaling.csv` (--from-scaling): same recipes, other machine; empty: not measured.",
        "s @ load: seconds of calibration and rounding, and the load average of the two cores while they were taken.",
        *(
            [f"† on {', '.join(elsewhere)}: after a method the row's figures, after an FD its images."]
            if elsewhere
            else []
        ),
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        var = "kl" in of_model[0]
        heads = ("KL, nats", "top-1", "cross-entropy") if var else ("output error", "trajectory error")
        fp = f"cross-entropy {of_model[0]['cross_entropy_fp']:.4f}" if var else f"loss {of_model[0]['loss_fp']:.4f}"
        lines += ["", f"## {model} (full precision: {fp})", ""]
        lines.append("| scheme | method | " + " | ".join(heads) + " | FD | bits | s @ load | peak MB |")
        lines.append("|---|---|" + "---|" * (len(heads) + 4))
        for title, (_, methods) in SCHEMES.items():
            of_scheme = [row for row in of_model if row["scheme"] == title]
            lines += [_line(row, var) for row in sorted(of_scheme, key=lambda row: methods.index(row["method"]))]
    return "\n".join(lines) + "\n"


def _away(device: str | None) -> bool:
    return device not in (None, "cpu")


def _line(row: dict[str, Any], var: bool) -> str:
    if var:
        cells = [f"{row['kl']:.4f}", f"{row['top1_agreement']:.3f}", f"{row['cross_entropy']:.4f}"]
    else:
        cells = [f"{row['output_mse']:.6f}", f"{row['trajectory_error']:.4f}"]
    fd, mark = row.get("fd"), " †" if _away(row.get("fd_device")) else ""
    cells.append(f"{fd['value']:.2f} ({fd['ci95'][0]:.2f}–{fd['ci95'][1]:.2f}), n={fd['n']}" + mark if fd else "")
    cells.append(f"{row['bits_per_weight']:.3f} / {row['information_bits_per_weight']:.3f}")
    cells.append(f"{row['solve_s']:.1f} @ {row['load_average']:.0f}")
    cells.append(f"{row['peak_memory_bytes'] / 1e6:.0f}" if row["peak_memory_bytes"] else "")
    method = row["method"] + (" †" if _away(row.get("device")) else "")
    return f"| {row['scheme']} | {method} | " + " | ".join(cells) + " |"


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["scheme"], row["method"]


def take_in(path: Path, found: list[dict[str, Any]]) -> None:
    """Put rows into the file: a whole one in place of that of its key, FD alone into the one that is there."""
    rows = {key_of(row): row for row in read(path)}
    for row in found:
        key = key_of(row)
        if "scheme_name" not in row and key not in rows:
            print(*key, "has FD but no row; left out", flush=True)
            continue
        rows[key] = row if "scheme_name" in row else rows[key] | row
    save(path, list(rows.values()))


def from_scaling(path: Path, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FD of rows without, from the results of `qexport scaling`: the same recipes, measured there by the same code.

    Error against full precision must be the same to `SAME`: on another machine GPTQ rounds some weights otherwise.
    """
    rows, found = {key_of(row): row for row in known}, []
    for line in csv.DictReader(path.read_text().splitlines()):
        key = line["model"], OF_SCALING.get(line["format"], ""), line["method"]
        row = rows.get(key)
        if row is None or "fd" in row or not line.get("fd"):
            continue
        ours, theirs = (float(x.get("kl") or x["output_mse"]) for x in (row, line))
        if abs(theirs - ours) > SAME * ours:
            print(*key, f"has an error of {theirs:.4g} there and {ours:.4g} here; left out", flush=True)
            continue
        fd = {"value": float(line["fd"]), "ci95": [float(line["fd_low"]), float(line["fd_high"])]}
        fd |= {"n": int(line["fd_n"]), "seed": int(line["seed"]), "from": path.name}
        found.append(
            dict(zip(("model", "scheme", "method"), key, strict=True)) | {"fd": fd, "fd_device": line["device"]}
        )
    return found


def missing(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Keys of the rows to be made, in order."""
    known = {key_of(row): "fd" in row for row in read(options.out)}
    found = []
    for key in ((model, title, method) for model in options.models for title in options.schemes
                for method in SCHEMES[title][1] if not options.methods or method in options.methods):  # fmt: skip
        if options.fd_only:
            wanted = key in known and (options.again or not known[key])
        else:
            wanted = options.again or key not in known or (bool(options.fd) and not known[key])
        if wanted:
            found.append(key)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--fd", type=int, default=0, help=f"images for FD; 0 leaves it out (--fd-only: {FD_IMAGES})")
    parser.add_argument("--fd-only", action="store_true", help="add FD to the rows that have none")
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="to judge and to sample on")
    parser.add_argument("--shard", metavar="I/N", help="every N-th missing row from the I-th (from 0)")
    parser.add_argument("--shard-out", type=Path, help="for the rows of a shard, in place of --out, which is read")
    parser.add_argument("--merge", type=Path, nargs="+", help="take in the rows of these files, and make the table")
    parser.add_argument("--from-scaling", type=Path, metavar="CSV", help="take FD from results of `qexport scaling`")
    parser.add_argument("--out", type=Path, default=RESULTS / "ptq_quality.jsonl")
    options = parser.parse_args()
    if options.from_scaling:
        take_in(options.out, from_scaling(options.from_scaling, read(options.out)))
        options.out.with_suffix(".md").write_text(table(read(options.out)))
        return
    if options.merge:
        take_in(options.out, [row for path in options.merge for row in read(path)])
        options.out.with_suffix(".md").write_text(table(read(options.out)))
        return
    if options.images is None and not options.fd_only:
        parser.error("--images is needed, unless --fd-only or --merge")
    if (options.shard is None) != (options.shard_out is None):
        parser.error("--shard and --shard-out belong together")
    torch.set_num_threads(options.threads)
    choose_device(options.device, "--device")
    shared = {"environment": describe_environment(options.device), "threads": options.threads}
    fd = options.fd or (FD_IMAGES if options.fd_only else 0)
    bench: Bench | None = None
    for model, title, method in shard_of(missing(options), options.shard):
        done = set() if options.shard_out is None else {key_of(row) for row in read(options.shard_out)}
        if (model, title, method) in done:
            continue
        if bench is None or bench.name != model:
            bench = Bench(model, options.images, fd, options.device)
        start_s = time.perf_counter()
        try:
            if options.fd_only:
                row = {"model": model, "scheme": title, "method": method, **bench.fd_of(SCHEMES[title][0], method)}
            else:
                row = bench.row(title, SCHEMES[title][0], method) | shared
        except QexportError as error:  # the others are made all the same
            print(f"{model} {title} {method}: failed: {error}", flush=True)
            continue
        if options.shard_out is None:
            take_in(options.out, [row])
        else:
            append(options.shard_out, row)
        figures = {name: row[name] for name in ("kl", "output_mse") if name in row}
        figures |= {"fd": row["fd"]["value"]} if "fd" in row else {}
        print(f"{model} {title} {method}: {figures}  {time.perf_counter() - start_s:.1f} s", flush=True)
    if options.shard is None:
        options.out.with_suffix(".md").write_text(table(read(options.out)))


if __name__ == "__main__":
    main()
