"""What one update of fine-tuning takes on a processor.

    python benchmarks/step_time.py [--model var-c10-d4] [--threads 1] [--steps 30] [--out benchmarks/results/step_time]

Batches of 8, 2 bits from round-to-nearest, with and without bfloat16, by `split` and `forward`. Milliseconds by the
clock between two reports of progress: median, least and greatest; the first five are not counted. To compare two
versions of the code, run it with each in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import torch

from qexport.distill import Distillation, DistillSettings, distill, drawn_tokens
from qexport.pipeline import load_generator
from qexport.recipe import recipe_for
from qexport.scheme import preset
from qexport.solve import solve
from qexport.verify.environment import describe_environment

WARM_UP = 5


def main() -> None:
    """Measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="var-c10-d4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_time"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = load_generator(args.model)
    recipe = recipe_for(preset(2), plain.default_layers, "w2")
    solution, samples = solve(copy.deepcopy(plain), recipe), drawn_tokens(plain, 80, seed=0)
    rows = []
    for bf16 in (True, False):
        for loss in ("split", "forward"):
            settings = DistillSettings(
                Distillation(loss), steps=args.steps, batch=8, held_out=16, bf16=bf16,
                evaluate_every=args.steps, checkpoint_every=args.steps,
            )  # fmt: skip
            ends: list[float] = []
            distill(
                copy.deepcopy(plain), recipe, solution, settings, data=samples,
                progress=lambda *_, ends=ends: ends.append(time.perf_counter()),
            )  # fmt: skip
            ms = sorted(1e3 * (b - a) for a, b in zip(ends[WARM_UP:-2], ends[WARM_UP + 1 : -1], strict=True))
            row = {"loss": loss, "bf16": bf16, "ms": [statistics.median(ms), ms[0], ms[-1]]}
            rows.append(row)
            print(f"{loss}{', bf16' if bf16 else ''}: {row['ms'][0]:.0f} ms ({ms[0]:.0f}–{ms[-1]:.0f})", flush=True)
    result = {
        "model": args.model, "threads": args.threads, "rows": rows, "load_average": os.getloadavg()[0],
        "environment": describe_environment("cpu"),
    }  # fmt: skip
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
