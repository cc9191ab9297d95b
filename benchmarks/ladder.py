"""Every scheme that can be exported climbs the ladder of `qexport verify` on a CPU, on the bundled models.

    python benchmarks/ladder.py [--models NAME …] [--only TEXT …] [--samples N] [--anew]

Each scheme is calibrated, exported and verified (without Fréchet distance and speed) on N trajectories, and becomes one
row: rungs passed and failed, and of every check the one that came nearest to its limit, with how near (1 is the limit).
Rows that are there are kept unless --anew is given, so that a run can be cut short and continued; those that are left
to do are named at the end. Writes results/ladder.json and ladder.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from qexport.errors import QexportError
from qexport.export import export
from qexport.family import Generator
from qexport.formats import get_format
from qexport.methods import parse_method
from qexport.pipeline import load_generator
from qexport.recipe import Calibration, Recipe, Rule
from qexport.scheme import ActivationSpec, PerGroup, Scheme, TensorSpec, preset
from qexport.solve import solve
from qexport.verify import VerifyReport, verify
from qexport.verify.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
MODELS = ("var-c10-d2", "dit-c10-d2")
CALIBRATED_ON = 4  # images: parity does not depend on how good the scales are
SCHEDULE = "ddim-10"  # of diffusion: short, and every bucket of timesteps is visited


def schemes() -> dict[str, tuple[Scheme, str]]:
    """Name → scheme of the default layers and method."""
    weights = {f"W{bits}": preset(bits) for bits in (16, 8, 6, 4, 3, 2)}
    weights |= {"W4 groups of 64": preset(4, group_size=64), "W2 groups of 64": preset(2, group_size=64)}
    weights |= {"W8 fp8 E4M3": preset(8, number_format="fp8"), "W8 fp8 E5M2": preset(8, number_format="fp8-e5m2")}
    found = {name: (scheme, "rtn") for name, scheme in weights.items()}
    found["ternary"] = preset(2), "ternary"
    for scales in ("static", "step", "token"):
        found[f"W8A8 int8 {scales}"] = preset(8, 8, activation_scales=scales), "rtn"
        found[f"W8A8 fp8 {scales}"] = preset(8, 8, number_format="fp8", activation_scales=scales), "rtn"
    lopsided = ActivationSpec(get_format("int8"), symmetric=False)
    found["W8A8 int8 zero point"] = Scheme(preset(8).weight, lopsided), "rtn"
    for scales in ("static", "token"):
        found[f"W4A8 {scales}"] = preset(4, 8, activation_scales=scales), "rtn"
    found |= {f"W4 {name}": (preset(4), name) for name in ("mse", "gptq", "awq", "awq+gptq")}
    found |= {f"W8A8 {name}": (preset(8, 8), name) for name in ("smoothquant", "smoothquant+gptq")}
    found["W2 gptq"] = Scheme(TensorSpec(get_format("int2"), PerGroup(32)), None), "gptq"
    return found


def rules_of(generator: Generator) -> dict[str, tuple[Rule, ...]]:
    """Name → rules, the decoder's schemes last."""
    found: dict[str, tuple[Rule, ...]] = {}
    for name, (scheme, method_name) in schemes().items():
        method = parse_method(method_name)
        found[name] = tuple(
            Rule(layers, scheme.weight, method.algorithm, method.smooth, scheme.activation)
            for layers in (generator.default_layers if scheme.weight else ())
        )
    decoder = next(iter(generator.decoder_layers)).partition("/")[0] + "/*"
    for name, scheme in (("decoder W8", preset(8)), ("decoder W8A8", preset(8, 8))):
        found[name] = (Rule(decoder, scheme.weight, activation=scheme.activation),)
    return found


def climb(generator: Generator, name: str, rules: Sequence[Rule], samples: int) -> dict[str, Any]:
    """The row of one scheme. The generator is as it was afterwards; smoothing is folded into it meanwhile."""
    start_s, model = time.perf_counter(), generator.entry.name
    schedule = SCHEDULE if SCHEDULE in generator.plan.schedules else None
    recipe = Recipe("ladder", tuple(rules), calibration=Calibration(CALIBRATED_ON, 0, schedule))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        try:
            with unchanged(generator):
                solution = solve(generator, recipe)
                bundle = export(generator, recipe, out, solution=solution, progress=lambda *_: None)
            report = verify(
                out, generator=generator, provider="cpu", samples=samples, schedule=schedule, speed=False, reports=False
            )
        except QexportError as error:
            return {"model": model, "scheme": name, "error": str(error)}
        notes = [found["text"] for found in bundle.manifest.notes]
    return {
        "model": model,
        "scheme": name,
        **judged(report),
        "bits_per_weight": report.bits_per_weight,
        "notes": notes,
        "seconds": round(time.perf_counter() - start_s, 1),
    }


@contextmanager
def unchanged(generator: Generator) -> Iterator[None]:
    """Parameters are put back afterwards, in place."""
    parameters = [value for spec in generator.graphs for value in spec.parameters().values()]
    before = [value.clone() for value in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(parameters, before, strict=True):
                value.copy_(old)


def judged(report: VerifyReport) -> dict[str, Any]:
    """Passed and failed rungs, and the check that came nearest to its limit."""
    near = [(c.value / c.limit, c) for c in report.checks if c.limit > 0 and math.isfinite(c.value)]
    share, worst = max(near, key=lambda found: found[0], default=(None, None))
    quality = report.quality
    merit = next((name for name in ("kl", "output_mse", "decoder_psnr_db") if name in quality), None)
    return {
        "passed": sum(check.passed for check in report.checks),
        "failed": [check.name for check in report.failures],
        "skipped": [rung.name for rung in report.skipped],
        "nearest": worst.name if worst else None,
        "value": worst.value if worst else None,
        "limit": worst.limit if worst else None,
        "share_of_limit": share,
        "merit": merit,
        "quality": quality[merit] if merit else None,
        "decoder_psnr_db": quality.get("decoder_psnr_db"),
    }


def table(data: dict[str, Any]) -> str:
    environment = data["environment"]
    versions = environment["versions"]
    lines = [
        "# Every exported scheme on the ladder, on a CPU\n",
        f"`python benchmarks/ladder.py`: {data['samples']} trajectories, calibrated on {CALIBRATED_ON} images, "
        f"schedule {SCHEDULE} for diffusion. torch {versions['torch']}, ONNX Runtime {onnxruntime.__version__}. "
        '"Nearest" is the check that came nearest to its limit. KL in nats a token; relative squared error of the '
        "output for diffusion. Qualities say that something sensible ran, no more: few samples, few images to "
        "calibrate on.\n",
    ]
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        lines += [
            f"\n## {model}\n",
            "| scheme | bits/weight | checks passed | failed | nearest to its limit | value | limit | quality |",
            "|---|---:|---:|---|---|---:|---:|---:|",
        ]
        for row in (row for row in data["rows"] if row["model"] == model):
            if "error" in row:
                lines.append(f"| {row['scheme']} | | | {row['error']} | | | | |")
                continue
            failed = ", ".join(row["failed"] + [f"skipped: {name}" for name in row["skipped"]]) or "–"
            psnr = "" if row["decoder_psnr_db"] is None else f", decoder {row['decoder_psnr_db']:.1f} dB"
            lines.append(
                f"| {row['scheme']} | {row['bits_per_weight']:.4g} | {row['passed']} | {failed} | {row['nearest']} | "
                f"{row['value']:.2g} | {row['limit']:.2g} | {row['quality']:.3g}{psnr} |"
            )
    passed = sum("error" not in row and not row["failed"] and not row["skipped"] for row in data["rows"])
    lines.append(f"\n{passed} of {len(data['rows'])} rows passed every rung.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="+", default=[""], help="schemes whose names hold one of these")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--anew", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "ladder.json"
    old = json.loads(path.read_text()) if path.exists() and not options.anew else {"rows": []}
    done = {(row["model"], row["scheme"]): row for row in old["rows"] if old.get("samples") == options.samples}
    left = []
    for model in options.models:
        generator = load_generator(model)
        order = list(rules_of(generator))
        for name, rules in rules_of(generator).items():
            if (model, name) in done:
                continue
            if not any(text in name for text in options.only):
                left.append(f"{model} {name}")
                continue
            done[model, name] = climb(generator, name, rules, options.samples)
            print(json.dumps(done[model, name]), flush=True)
            data = {
                "samples": options.samples,
                "environment": describe_environment("cpu"),
                "rows": sorted(done.values(), key=lambda row: (MODELS.index(row["model"]), order.index(row["scheme"]))),
            }
            path.write_text(json.dumps(data, indent=1) + "\n")
            (RESULTS / "ladder.md").write_text(table(data))
    print("left to do:", ", ".join(left) or "nothing")


if __name__ == "__main__":
    main()
