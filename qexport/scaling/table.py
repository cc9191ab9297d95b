"""The results as CSV: one line a run, every figure with its interval."""

from __future__ import annotations

import csv
import io
from typing import Any

from qexport.scaling.figures import FD, FIGURES
from qexport.scaling.grid import size_of
from qexport.scaling.select import Selection

_COST = (
    "parameters", "total_bits", "stored_bits", "matrix_bits", "total_bits_with_decoder", "stored_bits_with_decoder",
    "bits_per_weight", "information_bits_per_weight", "macs", "compute_bits",
)  # fmt: skip


def csv_text(selection: Selection) -> str:
    """The table, its first line the names. A figure has three columns: value, ``_low`` and ``_high`` (95 %)."""
    names = [name for name in (*FIGURES, FD) if any(name in row.measured.figures for row in selection.rows.values())]
    heads = ["model", "series", "size", "format", "bits", "method", *_COST]
    for name in names:
        heads += [name, f"{name}_low", f"{name}_high", f"{name}_n"]
    heads += ["seed", "device", "wall_s", "threads", "finished_at", "version", "key"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for run, row in selection.rows.items():
        line: list[Any] = [run.model, run.series, size_of(run.model), run.number_format, run.bits, run.method]
        line += [row.measured.cost[name] for name in _COST]
        for name in names:
            figure = row.measured.figures.get(name)
            line += [figure["value"], *figure["ci95"], figure["n"]] if figure else [""] * 4
        line += [row.settings["measurement"]["seed"], row.settings.get("device", "cpu"), row.wall_s]
        line += [row.environment.get("torch_threads", "")]
        writer.writerow([*line, row.finished_at, row.version, row.key])
    return out.getvalue()
