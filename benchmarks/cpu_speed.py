"""Whole images per second on the CPU: bundles under ONNX Runtime against the same model in torch, in one run.

    python benchmarks/cpu_speed.py --model var-c10-d4 --batches 1,16,64 --out benchmarks/results/cpu_speed.json

Bundles of three widths are made here and measured by `qexport bench`, whose rules hold: every contender plays the same
plan with the same noise in a process of its own, they take turns, and what counts are ratios of times in the same turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTHS = {16: "ORT W16 (fp32 compute)", 8: "ORT W8A16", 4: "ORT W4A16"}
EAGER = "torch eager"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report of `qexport bench`."""
    from qexport.bench.run import bench
    from qexport.pipeline import quantize
    from qexport.scheme import preset

    bundles = []
    for bits, name in WIDTHS.items():
        bundles.append(folder / name)
        quantize(args.model, scheme=preset(bits), out=bundles[-1])
    report = bench(
        bundles,
        batches=[int(size) for size in args.batches.split(",")],
        provider="cpu",
        targets=["portable"],
        threads=args.threads,
        runs=args.repeats,
        warm_up=args.warmup,
        against=["eager"] if args.no_compile else ["eager", "compile"],
        reports=False,
    )
    return report.to_json()


def show(model: str, report: dict[str, Any]) -> None:
    """One table for each batch size."""
    from rich.console import Console
    from rich.table import Table

    for size in report["contenders"][0]["batches"]:
        table = Table(title=f"{model}, batch {size}: ms per batch, whole images")
        for column in ("form", "median", "min", "max", "images/s", "× eager"):
            table.add_column(column, justify="left" if column == "form" else "right")
        for row in report["contenders"]:
            batch = row["batches"][size]
            ms, eager = batch["latency_ms"]["total"], batch["times_as_fast_as"].get(EAGER)
            figures = (ms["median"], ms["min"], ms["max"], batch["images_per_s"], eager["median"] if eager else 1.0)
            table.add_row(row["name"], *(f"{figure:.2f}" for figure in figures))
        Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="var-c10-d4")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="qexport-cpu-speed-") as folder:
        report = measure(args, Path(folder))
    show(args.model, report)
    report = {
        "command": "python benchmarks/cpu_speed.py",
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        **report,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
