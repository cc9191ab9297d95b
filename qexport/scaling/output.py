"""What a sweep leaves in its folder: table, plots, page; and the report where one is asked for."""

from __future__ import annotations

from pathlib import Path

from qexport.hidden import replacing
from qexport.scaling.axes import COMPUTE
from qexport.scaling.curves import curves_of
from qexport.scaling.figures import FD
from qexport.scaling.findings import Finding, findings, findings_of_axis, laws_of
from qexport.scaling.page import render
from qexport.scaling.plots import curve_plot, plots_of, png_of, svg_of
from qexport.scaling.report import markdown
from qexport.scaling.select import Selection
from qexport.scaling.series_plot import series_plot
from qexport.scaling.table import csv_text

CSV, PAGE, PLOTS = "results.csv", "index.html", "plots"
FURTHER_AXES = (COMPUTE, "matrix_bits")
"""Quality is also drawn against these; what is said is said of total bits and of compute bits."""


def write_results(selection: Selection, folder: Path, report: Path | None) -> tuple[list[Path], list[Finding]]:
    """Write everything, each file whole or not at all; returns their paths, and the findings.

    Raises:
        OSError: a place that cannot be written.
    """
    laws, by_compute = laws_of(selection), laws_of(selection, COMPUTE)
    found = findings(laws) + findings_of_axis(by_compute)
    drawn = plots_of(laws)
    if (together := series_plot(by_compute, FD)) is not None:
        drawn[f"{FD}-{COMPUTE}"] = together
    for series, law in laws.items():
        for axis in FURTHER_AXES if law.quality else ():
            curves = list(curves_of(selection, series, law.quality or "", axis).values())
            drawn[f"{series}-{law.quality}-{axis}"] = curve_plot(curves, series, law.quality or "", axis)
    vectors = {name: svg_of(figure) for name, figure in drawn.items()}
    files = [_write(folder / CSV, csv_text(selection).encode())]
    for name, figure in drawn.items():
        _write(folder / PLOTS / f"{name}.svg", vectors[name].encode())
        _write(folder / PLOTS / f"{name}.png", png_of(figure))
    if drawn:
        files.append(folder / PLOTS)
    files.append(_write(folder / PAGE, render(selection, found, vectors).encode()))
    if report is not None:
        # Pictures are named as they lie beside the results; who publishes the report copies those it shows.
        files.append(_write(report, markdown(selection, found, {}).encode()))
    return files, found


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(data)
    return path
