"""What each loss of fine-tuning takes with its gradient, beside PyTorch's own kl_div through autograd.

    python benchmarks/loss_time.py [--threads 1] [--repeats 15] [--out benchmarks/results/loss_time]

1,240 positions of 4,096 logits: a batch of 8 images of var-c10. The teacher's logits are normal with a standard
deviation of 2, the student's differ by 0.1. Losses take turns; milliseconds by the clock, median, least and greatest,
and the median of the time over that of kl_div in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qexport.distill.losses import LOSSES, Distillation
from qexport.verify.environment import describe_environment

POSITIONS, VOCABULARY = 1240, 4096
PEER = "F.kl_div"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 2


def peer(teacher: Tensor, student: Tensor, tokens: Tensor) -> Tensor:
    """KL(p‖q) of each position as one writes it without this library."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def measure(dtype: torch.dtype, repeats: int) -> dict[str, list[float]]:
    """Loss → seconds of each turn."""
    torch.manual_seed(0)
    z = 2 * torch.randn(POSITIONS, VOCABULARY)
    teacher, student = z.to(dtype), (z + 0.1 * torch.randn_like(z)).to(dtype).requires_grad_()
    tokens = teacher.argmax(-1)
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {PEER: peer}
    losses.update({name: Distillation(name) for name in LOSSES})
    found: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(WARM_UP + repeats):
        for name, loss in losses.items():
            student.grad = None
            start = time.perf_counter()
            loss(teacher, student, tokens).mean().backward()
            if turn >= WARM_UP:
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Measure, and write JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_time"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype_name, dtype in DTYPES.items():
        found = measure(dtype, args.repeats)
        for name, seconds in found.items():
            ratio = statistics.median(own / other for own, other in zip(seconds, found[PEER], strict=True))
            times = [1e3 * value for value in (statistics.median(seconds), min(seconds), max(seconds))]
            rows.append({"dtype": dtype_name, "loss": name, "ms": times, "of_kl_div": ratio})
    load, environment = os.getloadavg()[0], describe_environment("cpu")
    result = {"threads": args.threads, "repeats": args.repeats, "load_average": load, "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps({**result, "environment": environment}, indent=1) + "\n")
    lines = [
        f"# Losses with their gradients: {environment['cpu']}, {args.threads} thread(s)",
        "",
        f"Made by `python benchmarks/loss_time.py`; its header says how. {POSITIONS:,} positions of {VOCABULARY:,}",
        f"logits, milliseconds (least to greatest of {args.repeats} turns). Load average at the end {load:.1f}.",
        "",
        "| logits | loss | ms | × kl_div |",
        "|---|---|---|---|",
    ]
    for row in rows:
        median, least, greatest = row["ms"]
        lines.append(
            f"| {row['dtype']} | `{row['loss']}` | {median:.0f} ({least:.0f}–{greatest:.0f}) | {row['of_kl_div']:.2f} |"
        )
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
