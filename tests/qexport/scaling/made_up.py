"""Rows of a sweep whose law is known, because it is written here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qexport.scaling.grid import FULL, Measurement, Run, describe
from qexport.scaling.select import Selection
from qexport.scaling.store import Measured, Row

IMAGES = 60
SIZES = {"d2": 1e6, "d3": 2e6, "d4": 4e6}

Value = Callable[[str, float, int, str], float]


def row(run: Run, value: float, *, parameters: float, bits: float, noise: float = 0.01, fd: bool = True) -> Row:
    """A row with cross-entropy (VAR) or loss of `value`, FD of ten times that, and images that spread by `noise`."""
    spread = np.random.default_rng(0).standard_normal(IMAGES) * noise
    images = value + spread - spread.mean()
    var = run.model.startswith("var")
    name = "cross_entropy" if var else "loss"
    merit = {"kl": images} if var else {"output_error": images, "output_power": np.ones(IMAGES)}
    arrays = {name: images, **merit}

    def figure(v: float, half: float) -> dict[str, object]:
        return {"value": v, "ci95": [v - half, v + half], "n": IMAGES}

    half = 1.96 * noise / np.sqrt(IMAGES)
    figures = {name: figure(value, half), ("kl" if var else "output_mse"): figure(value, half)}
    if fd:
        figures["fd"] = figure(10 * value, 10 * noise) | {"name": "made up", "seed": 0}
    stored = {3: 4, 6: 8}.get(run.bits, run.bits)
    cost = {
        "parameters": parameters, "total_bits": parameters * bits, "stored_bits": parameters * stored,
        "matrix_bits": parameters * bits, "total_bits_with_decoder": parameters * bits + 8e6,
        "stored_bits_with_decoder": parameters * stored + 8e6, "bits_per_weight": bits,
        "information_bits_per_weight": bits, "macs": parameters * 100, "compute_bits": parameters * 100 * bits,
    }  # fmt: skip
    settings = {"measurement": describe(Measurement(images_sha256="0")), "judged_on": "images that are made up"}
    measured = Measured(figures, cost, arrays, settings)
    return Row(f"{run}", run, measured, {"torch_threads": 1}, "0", "2020-01-01T00:00:00+00:00", 1.0)


def selection(
    value: Value, series: tuple[str, ...] = ("var-c10",), methods: tuple[str, ...] = ("rtn",), noise: float = 0.01
) -> Selection:
    """Sizes d2, d3, d4 at 16 bits and int 2, 3, 4 of each series; `value(series, parameters, bits, method)`."""
    rows: dict[Run, Row] = {}
    for name in series:
        for size, parameters in SIZES.items():
            runs = [Run(f"{name}-{size}", FULL)]
            runs += [Run(f"{name}-{size}", f"int{bits}", method) for bits in (2, 3, 4) for method in methods]
            for run in runs:
                found = value(name, parameters, run.bits, run.method)
                rows[run] = row(run, found, parameters=parameters, bits=float(run.bits), noise=noise)
    return Selection(rows, describe(Measurement(images_sha256="0")), 0)
