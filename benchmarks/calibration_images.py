"""Calibrated on the model's own samples, and on images of the data set: what either is worth.

    python benchmarks/calibration_images.py --train cifar_train.npz --images cifar_test.npz

Each scheme of the reference models is solved from 64 samples that the model draws itself and from 64 training images
(`qexport.calibration_data`: drawn under the seed, classes in turn), under several seeds, and judged on test images as
in `ptq_quality.py`: KL to the full-precision model and top-1 agreement (VAR), or output and trajectory error (DiT).
The seed changes what is drawn to calibrate on, and nothing else.

Writes ``calibration_images.json`` and ``.md``; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ptq_quality import CALIBRATION, SCHEMES, Bench

from qexport.calibration_data import on_images
from qexport.methods import parse_method
from qexport.recipe import Calibration
from qexport.request import Request
from qexport.verify.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
MODELS = ("var-c10-d2", "dit-c10-d2")
CASES = (("W4", "gptq"), ("W8A8 static", "rtn"))
OWN, IMAGES = "own samples", "training images"
SEEDS = 3
FIGURES = ("kl", "top1_agreement", "output_mse", "trajectory_error")


def calibration(bench: Bench, title: str, method: str, source: str, seed: int, train: Path) -> Calibration:
    """What the layers are shown."""
    usual = CALIBRATION[bench.plain.entry.family]
    if source == OWN:
        return Calibration(usual.samples, seed, usual.schedule)
    request = Request(SCHEMES[title][0], parse_method(method), samples=usual.samples, seed=seed)
    found = on_images(bench.plain, request, train).calibration(bench.plain)
    assert found.schedule == usual.schedule
    return found


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "scheme", "method", "source", "seed"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Calibrated on own samples and on images",
        "",
        "Made by `python benchmarks/calibration_images.py` (its header says how). VAR: KL in nats and top-1 agreement",
        "on 500 test images; DiT: output error on 250 noised test images, and relative L2 of 20 final latents. Mean",
        "over the seeds of what is calibrated on, and each seed's own figure.",
        "",
        "| model | scheme | method | calibrated on | KL or output error | seeds | top-1 or trajectory error |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(key_of(row)[:-1] for row in rows):
        own = [row for row in rows if key_of(row)[:-1] == case]
        merits, others = ([_figure(row, names) for row in own] for names in (FIGURES[::2], FIGURES[1::2]))
        each = ", ".join(f"{value:.5g}" for value in merits)
        lines.append(f"| {' | '.join(case)} | {np.mean(merits):.5g} | {each} | {np.mean(others):.4f} |")
    return "\n".join(lines) + "\n"


def _figure(row: dict[str, Any], names: tuple[str, ...]) -> float:
    return float(next(row[name] for name in names if name in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="CIFAR-10 training images: calibrated on")
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-10's test images: judged on")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration_images.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = {"environment": describe_environment("cpu"), "threads": options.threads}
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for model in MODELS:
        bench = Bench(model, options.images, 0, "cpu")
        for title, method in CASES:
            for seed in range(options.seeds):
                for source in (OWN, IMAGES):
                    key = (model, title, method, source, seed)
                    if key in map(key_of, rows):
                        continue
                    bench.calibration = calibration(bench, title, method, source, seed, options.train)
                    found = bench.row(title, SCHEMES[title][0], method)
                    row = dict(zip(("model", "scheme", "method", "source", "seed"), key, strict=True))
                    row |= {name: found[name] for name in FIGURES if name in found}
                    row |= {name: found[name] for name in ("n", "calibration", "solve_s", "load_average")}
                    rows.append(row)
                    options.out.write_text(json.dumps({**environment, "rows": rows}, indent=1) + "\n")
                    print(*key, {name: row[name] for name in FIGURES if name in row}, flush=True)
    options.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
