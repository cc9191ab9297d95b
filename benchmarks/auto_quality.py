"""Mixed precision against simple rules that spend the same bits.

    python benchmarks/auto_quality.py --images cifar_test.npz [--models var-c10-d4 …] [--bits 4.5]

`auto`, as `quantize --method auto --target-bits BITS` chooses (sensitivities from 32 samples that the model draws),
beside rules that a person would write with no more bits on disk, scales included: one group size everywhere, or larger
groups and the rest of the budget on one kind of layer, or on the first or last block, in int8. All rounded by GPTQ with
the same calibration, judged on every 20th (VAR) or 40th (DiT) of CIFAR-10's test images. Writes
results/auto_quality.json and .md; models that are not asked for stay as they are in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qexport.auto.plot import kind_of
from qexport.compare import make_judge
from qexport.compare.methods import run_one
from qexport.decide import SENSITIVITY_PLOT, SENSITIVITY_REPORT, decide
from qexport.family import Generator, find_model
from qexport.formats import get_format
from qexport.methods import AUTO_ALGORITHM, parse_method
from qexport.quantize import assign_rules
from qexport.recipe import Recipe, Rule
from qexport.request import Budget, Request
from qexport.scheme import PerChannel, PerGroup, TensorSpec, preset
from qexport.verify.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
EVERY = {"var": 20, "dit": 40}
INT8 = TensorSpec(get_format("int8"), PerChannel())


def int4(group: int) -> TensorSpec:
    return TensorSpec(get_format("int4"), PerGroup(group))


def simple_rules(layers: list[str]) -> Iterator[tuple[str, dict[str, TensorSpec]]]:
    """Names and formats; those above the budget are left out later."""
    for group in (16, 32, 64, 128):
        base = dict.fromkeys(layers, int4(group))
        yield f"int4 groups of {group}", base
        for kind in dict.fromkeys(map(kind_of, layers)):
            chosen = {layer: INT8 for layer in layers if kind_of(layer) == kind}
            yield f"int4 groups of {group}, {kind} in int8", base | chosen
        blocks = list(dict.fromkeys(".".join(layer.split(".")[:2]) for layer in layers))
        for which, block in (("first", blocks[0]), ("last", blocks[-1])):
            chosen = {layer: INT8 for layer in layers if layer.startswith(f"{block}.")}
            yield f"int4 groups of {group}, {which} block in int8", base | chosen


def measure(name: str, images: Path, bits: float) -> dict[str, Any]:
    family, entry = find_model(name)
    generator = family.load(entry, None, None)
    request = Request(preset(4), parse_method(AUTO_ALGORITHM), budget=Budget(bits))
    decision = decide(generator, request, lambda stage, done, total: None)
    report = json.loads(decision.reports[SENSITIVITY_REPORT])
    (RESULTS / f"sensitivity-{name}.svg").write_bytes(decision.reports[SENSITIVITY_PLOT])
    judge = make_judge(generator, images=images, every=EVERY[entry.family])
    rows = []
    for title, recipe in [("auto", decision.recipe), *recipes(generator, bits)]:
        row = run_one(copy.deepcopy(generator), title, recipe, judge).to_json()
        row.pop("per_scale", None)
        rows.append(row)
        print(name, title, row.get("kl", row.get("output_mse")), row["bits_per_weight"], flush=True)
    return {"rows": rows, "chosen": report["chosen"], "predicted": report["predicted"], "sensitivity": report["rows"]}


def recipes(generator: Generator, bits: float) -> Iterator[tuple[str, Recipe]]:
    request = Request(preset(4))
    layers = list(assign_rules(generator, request.recipe(generator)))
    sizes = {layer: _parameter(generator, layer).shape for layer in layers}
    for title, formats in simple_rules(layers):
        stored = sum(_bits(spec, sizes[layer]) for layer, spec in formats.items())
        if stored <= bits * sum(rows * columns for rows, columns in sizes.values()):
            rules = tuple(Rule(layer, spec, AUTO_ALGORITHM) for layer, spec in formats.items())
            yield title, Recipe(title, rules, calibration=request.calibration(generator))


def _parameter(generator: Generator, layer: str) -> torch.Tensor:
    graph, name = generator.layers[layer]
    return generator.graph(graph).parameters()[name]


def _bits(spec: TensorSpec, shape: torch.Size) -> int:
    from qexport.auto.sensitivity import stored_bits

    return stored_bits(spec, (shape[0], shape[1]))


def table(models: dict[str, Any], bits: float) -> str:
    lines = [
        f"# Mixed precision at {bits:g} bits a weight, scales included",
        "",
        "Made by `python benchmarks/auto_quality.py --images cifar_test.npz`; its header has the rules.",
        "Best first.",
    ]
    for name, model in models.items():
        merit = "kl" if "kl" in model["rows"][0] else "output_mse"
        lines += ["", f"## {name}", "", f"| rule | {merit} | bits a weight |", "|---|---|---|"]
        for row in sorted(model["rows"], key=lambda row: row[merit]):
            lines.append(f"| {row['method']} | {row[merit]:.3g} | {row['bits_per_weight']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10's test images: cifar_test.npz")
    parser.add_argument("--models", nargs="+", default=["var-c10-d4", "dit-c10-d4"])
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--out", type=Path, default=RESULTS / "auto_quality.json")
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"bits": None}
    models = kept["models"] if kept["bits"] == options.bits else {}
    models |= {name: measure(name, options.images, options.bits) for name in options.models}
    data = {
        "bits": options.bits,
        "environment": describe_environment("cpu"),
        "load_average": os.getloadavg()[0],
        "models": models,
    }
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(models, options.bits))


if __name__ == "__main__":
    main()
