"""What FD of the table of post-training methods can tell: whose interval overlaps full precision's, and how it ranks.

    python benchmarks/ptq_fd.py

Read from results/ptq_quality.jsonl and, for full precision, results/scaling.csv; nothing is measured. Overlapping
intervals do not prove that two models draw equally well, only that so many images do not tell them apart. Ranks:
Spearman's correlation of FD with the error against full precision, over the rows that have FD.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    with (RESULTS / "scaling.csv").open() as file:
        full = {row["model"]: row for row in csv.DictReader(file) if row["format"] == "fp16"}
    rows = [json.loads(line) for line in (RESULTS / "ptq_quality.jsonl").read_text().splitlines()]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        with_fd = [row for row in of_model if "fd" in row]
        low, high = float(full[model]["fd_low"]), float(full[model]["fd_high"])
        figure = "kl" if "kl" in of_model[0] else "output_mse"
        apart = [row for row in with_fd if row["fd"]["ci95"][0] > high or row["fd"]["ci95"][1] < low]
        alike = [row for row in with_fd if row not in apart]
        rho = spearmanr([row[figure] for row in with_fd], [row["fd"]["value"] for row in with_fd]).statistic
        print(
            f"{model}: {len(with_fd)} of {len(of_model)} rows have FD; full precision {float(full[model]['fd']):.2f} "
            f"({low:.2f}–{high:.2f}); {len(alike)} overlap, up to {figure} {max(r[figure] for r in alike):.3g}; "
            f"Spearman {rho:.2f}; apart:"
        )
        for row in sorted(apart, key=lambda row: row[figure]):
            print(f"  {row['scheme']} {row['method']}: {figure} {row[figure]:.3g}, FD {row['fd']['value']:.2f}")


if __name__ == "__main__":
    main()
