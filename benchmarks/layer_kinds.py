"""Which kind of layer suffers most when inputs are rounded as well as weights: one layer at a time, summed by kind.

    python benchmarks/layer_kinds.py --images cifar_test.npz [--models dit-c10-d2 var-c10-d4] [--every N]

Each layer alone in a full-precision model: its weight in int8 (a scale per output channel, least squared error), its
input in int8 (static scales of least squared error, static absmax, a scale per token), and weight and input together.
VAR: KL to the full-precision model, teacher forced, unguided. DiT: squared output error, relative to the mean power of
the outputs. Scales are measured on images that the model draws: 16 (VAR) or 64 (DiT, ddim-25). A kind costs the sum of
its layers; intervals (95 %) and the share in which a kind costs most are of 2,000 bootstrap samples of the images.
Writes results/layer_kinds.json and .md. The data set is read, never copied.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from qexport.algorithms import get_algorithm
from qexport.auto.alone import input_activations, rounded_weight, with_input
from qexport.auto.plot import kind_of
from qexport.auto.sensitivity import PROBE_ALGORITHM
from qexport.compare import Judge, make_judge
from qexport.compare.judge import PER_IMAGE
from qexport.family import Generator, find_model
from qexport.formats import get_format
from qexport.quantize import assign_rules
from qexport.recipe import Calibration, recipe_for
from qexport.scheme import ActivationSpec, PerChannel, PerToken, Static, TensorSpec, preset
from qexport.solution import Activation
from qexport.verify.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
INT8 = preset(8)
WEIGHTS = TensorSpec(get_format("int8"), PerChannel())
EVERY = {"var": 400, "dit": 100}
CALIBRATION = {"var": Calibration(16), "dit": Calibration(64, schedule="ddim-25")}
RESAMPLES = 2000
WEIGHT, BOTH = "weight", "weight and static input"
INPUTS = {
    "static input": ActivationSpec(get_format("int8"), Static()),
    "absmax input": ActivationSpec(get_format("int8"), Static(), observer="minmax"),
    "input per token": ActivationSpec(get_format("int8"), PerToken()),
}
COLUMNS = (WEIGHT, *INPUTS, BOTH)


def measure(name: str, images: Path, every: int | None) -> dict[str, Any]:
    family, entry = find_model(name)
    every = every or EVERY[entry.family]
    full = family.load(entry, None, None)
    layers = list(assign_rules(full, recipe_for(INT8, full.default_layers, "kinds")))
    scales = {title: input_activations(full, layers, spec, CALIBRATION[entry.family]) for title, spec in INPUTS.items()}
    judge = make_judge(full, images=images, every=every, per_image=True)
    probe = family.load(entry, None, None)
    sums: dict[tuple[str, str], Any] = defaultdict(lambda: 0.0)
    counts, weights = defaultdict(int), defaultdict(int)
    for layer in layers:
        kind = kind_of(layer)
        graph, parameter_name = probe.layers[layer]
        parameter = probe.graph(graph).parameters()[parameter_name]
        restored = get_algorithm(PROBE_ALGORITHM)(parameter.detach().numpy(), WEIGHTS, name=layer).dequantize()
        for title in INPUTS:
            sums[kind, title] += by_image(probe, layer, scales[title][layer], judge)
        with rounded_weight(parameter, restored):
            sums[kind, WEIGHT] += by_image(probe, layer, None, judge)
            sums[kind, BOTH] += by_image(probe, layer, scales["static input"][layer], judge)
        counts[kind] += 1
        weights[kind] += restored.size
        print(name, layer, {title: float(np.mean(sums[kind, title])) for title in COLUMNS}, flush=True)
    return {
        "images": len(next(iter(sums.values()))),
        "load_average": os.getloadavg()[0],
        "kinds": rows(sums, counts, weights),
    }


def by_image(probe: Generator, layer: str, activation: Activation | None, judge: Judge) -> np.ndarray:
    """What is lost, (n,), so that the mean over images is the figure: KL, or the relative squared output error."""
    found = with_input(probe, layer, activation, judge)[PER_IMAGE]
    if "kl" in found:
        return found["kl"]
    return found["output_error"] / found["output_power"].mean()


def rows(sums: dict[tuple[str, str], np.ndarray], counts: dict[str, int], weights: dict[str, int]) -> list[Any]:
    kinds = list(counts)
    images = len(sums[kinds[0], WEIGHT])
    picked = np.random.default_rng(0).integers(0, images, (RESAMPLES, images))
    found = [{"kind": kind, "layers": counts[kind], "weights": weights[kind]} for kind in kinds]
    for title in COLUMNS:
        cost_KN = np.stack([sums[kind, title] for kind in kinds])
        resampled_KR = cost_KN[:, picked].mean(axis=2)
        worst_R = resampled_KR.argmax(axis=0)
        for number, row in enumerate(found):
            low, high = np.quantile(resampled_KR[number], (0.025, 0.975))
            row[title] = {
                "cost": float(cost_KN[number].mean()),
                "interval": [float(low), float(high)],
                "share_worst": float((worst_R == number).mean()),
            }
    return found


def table(models: dict[str, Any]) -> str:
    lines = [
        "# What rounding one layer to int8 costs, by kind of layer",
        "",
        "Made by `python benchmarks/layer_kinds.py --images cifar_test.npz`; its header says how. KL in nats (VAR) or",
        "relative squared output error (DiT), ×10⁶, summed over the layers of a kind, each rounded alone; 95 %",
        "bootstrap intervals over images. **Bold**: the greatest of its column in at least 95 % of the samples.",
    ]
    for name, model in models.items():
        lines += ["", f"## {name}, {model['images']} images", "", "| kind | " + " | ".join(COLUMNS) + " |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for row in model["kinds"]:
            cells = []
            for title in COLUMNS:
                cost, (low, high) = row[title]["cost"] * 1e6, (x * 1e6 for x in row[title]["interval"])
                figure = f"{cost:.3g}"
                mark = "**" if row[title]["share_worst"] >= 0.95 else ""
                cells.append(f"{mark}{figure}{mark} ({low:.3g}–{high:.3g})")
            lines.append(f"| `{row['kind'].removeprefix('blocks.*.')}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--models", nargs="+", default=["dit-c10-d2", "var-c10-d4"])
    parser.add_argument("--every", type=int, help="take every n-th of the 10,000 images; VAR 400, DiT 100")
    parser.add_argument("--out", type=Path, default=RESULTS / "layer_kinds.json")
    options = parser.parse_args()
    models = json.loads(options.out.read_text())["models"] if options.out.exists() else {}
    for name in options.models:
        models[name] = measure(name, options.images, options.every)
        data = {"environment": describe_environment("cpu"), "models": models}
        options.out.write_text(json.dumps(data, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(models))


if __name__ == "__main__":
    main()
