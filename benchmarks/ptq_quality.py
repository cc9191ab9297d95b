"""Every scheme by every method on the reference models: quality, bits, time and memory, in one table.

    python benchmarks/ptq_quality.py --images cifar_test.npz [--models var-c10-d2 …] [--rows W4 …] [--fd 1000]

VAR: KL to the full-precision model, top-1 agreement and cross-entropy on every 20th of CIFAR-10's 10,000 test images
(500), teacher forced, no guidance. DiT: squared output error on every 40th (250), relative to the full-precision
output, and relative L2 of the final latents of 20 trajectories. Calibration: 64 images that the model draws itself,
seed 0 (DiT: by ddim-25). torch on the CPU in float32. Peak memory is that of the process while it calibrates and
rounds, model and reference included (Linux only). `load_average` is stated with every row: only rows of a quiet machine
are good for their seconds.

One line of ptq_quality.jsonl a row, written when it is done; what is there is not measured again, so a run can be
interrupted. The table, ptq_quality.md, is made of all lines. The data set is read, never copied.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from qexport.compare import make_judge
from qexport.family import FeatureExtractor, Generator, find_model
from qexport.formats import get_format
from qexport.methods import parse_method
from qexport.recipe import Calibration, Recipe, Rule
from qexport.reference import torch_player
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
BATCH = 50
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
    """One model, its judge, and what the full-precision model does."""

    def __init__(self, name: str, images: Path, fd: int) -> None:
        family, entry = find_model(name)
        self.plain = family.load(entry, None, None)
        self.name, self.fd, self.calibration = name, fd, CALIBRATION[entry.family]
        self.judge = make_judge(self.plain, images=images, every=EVERY[entry.family])
        self.drawn: Trajectories | None = None
        if self.plain.denoise is not None:
            self.drawn = self.trajectories(self.plain)

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
        recipe = self.recipe(scheme, method)
        forget_peak()
        start_s = time.perf_counter()
        solution = solve(copy.deepcopy(self.plain), recipe)
        rows: list[dict[str, Any]] = []
        twin = quantised_twin(self.plain, recipe, solution, lambda weight: rows.append(layer_row(weight))).quantised
        solve_s, peak = time.perf_counter() - start_s, peak_bytes()
        summed = totals(rows)
        start_s = time.perf_counter()
        figures = dict(self.judge(twin, bool(solution.activations)))
        judge_s = time.perf_counter() - start_s
        figures.pop("per_scale", None)
        figures.pop("per_range", None)
        if self.drawn is not None:
            quality = trajectory_quality(self.drawn, self.trajectories(twin))
            figures["trajectory_error"] = quality.trajectory_error
        if self.fd:
            figures["fd"] = self.frechet(twin)
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
            "calibration": vars(self.calibration),
        }

    def frechet(self, generator: Generator) -> dict[str, Any]:
        """FD of images that the quantised model samples in torch."""
        extractor: FeatureExtractor | None = generator.features
        assert extractor is not None
        player, labels = torch_player(generator), labels_for(self.fd, generator.entry.num_classes)
        batches = (
            player.play(label_inputs(generator.plan, labels[i : i + BATCH]), seed=0, first_index=i)
            for i in range(0, self.fd, BATCH)
        )
        return measure_fd(batches, extractor, 0).to_json()


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


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Post-training quantisation of the reference models",
        "",
        "Made by `python benchmarks/ptq_quality.py --images cifar_test.npz` (its header says how everything is",
        "measured); every line of `ptq_quality.jsonl` is a row here. Block matrices are quantised, nothing else. Bits",
        "per quantised weight include scales, as stored / as information. FD: FeatureNet, 95 % bootstrap interval,",
        "only where it was asked for.",
        "s @ load: seconds of calibration and rounding, and the load average of the two cores while they were taken.",
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


def _line(row: dict[str, Any], var: bool) -> str:
    if var:
        cells = [f"{row['kl']:.4f}", f"{row['top1_agreement']:.3f}", f"{row['cross_entropy']:.4f}"]
    else:
        cells = [f"{row['output_mse']:.6f}", f"{row['trajectory_error']:.4f}"]
    fd = row.get("fd")
    cells.append(f"{fd['value']:.2f} ({fd['ci95'][0]:.2f}–{fd['ci95'][1]:.2f}), n={fd['n']}" if fd else "")
    cells.append(f"{row['bits_per_weight']:.3f} / {row['information_bits_per_weight']:.3f}")
    cells.append(f"{row['solve_s']:.1f} @ {row['load_average']:.0f}")
    cells.append(f"{row['peak_memory_bytes'] / 1e6:.0f}" if row["peak_memory_bytes"] else "")
    return f"| {row['scheme']} | {row['method']} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--fd", type=int, default=0, help="images for FD; 0 leaves it out")
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "ptq_quality.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = describe_environment("cpu")
    for model in options.models:
        bench: Bench | None = None
        for title in options.schemes:
            scheme, methods = SCHEMES[title]
            for method in methods:
                if options.methods and method not in options.methods:
                    continue
                known = {(r["model"], r["scheme"], r["method"], "fd" in r) for r in read(options.out)}
                if (
                    not options.again
                    and {(model, title, method, True), (model, title, method, bool(options.fd))} & known
                ):
                    continue
                bench = bench or Bench(model, options.images, options.fd)
                row = bench.row(title, scheme, method) | {"environment": environment, "threads": options.threads}
                rest = [
                    r for r in read(options.out) if (r["model"], r["scheme"], r["method"]) != (model, title, method)
                ]
                save(options.out, [*rest, row])
                figure = row.get("kl", row.get("output_mse"))
                print(f"{model} {title} {method}: {figure:.6f}  {row['solve_s']} s + {row['judge_s']} s", flush=True)
    options.out.with_suffix(".md").write_text(table(read(options.out)))


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


if __name__ == "__main__":
    main()
