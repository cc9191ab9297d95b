"""The best run of a store within a budget of bytes: size × bits × method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.formats import get_format
from qexport.methods import METHODS
from qexport.scaling.figures import FD, FIGURES, draws, interval, label_of, resampled
from qexport.scaling.grid import FULL, NO_METHOD, Run
from qexport.scaling.repeat import command_for, weights_of
from qexport.scaling.select import Selection
from qexport.scaling.store import Row


@dataclass(frozen=True, eq=False)
class Answer:
    """Of one series: the best row and how it is judged, or nothing and the least size there is.

    `words` says whether the next best is worse for certain, or why there is no answer; `weights` which file the command
    needs, where the model's are not bundled.
    """

    series: str
    row: Row | None
    figure: str
    value: float
    interval: tuple[float, float]
    size_bytes: float
    least_bytes: float
    words: str
    command: str
    weights: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        run = self.row.run if self.row else None
        return {
            "series": self.series, "model": run and run.model, "format": run and run.number_format,
            "bits": run and run.bits, "method": run and run.method, "figure": self.figure, "value": self.value,
            "ci95": list(self.interval), "size_bytes": self.size_bytes, "least_bytes": self.least_bytes,
            "words": self.words, "command": self.command, "weights": self.weights,
        }  # fmt: skip


def quality_of(selection: Selection, rows: Sequence[Row]) -> str | None:
    """The figure that tells models of different sizes apart: cross-entropy or loss on real images, else FD.

    KL and output error do not: they compare a model with its own full precision. None where there is no such figure.
    """
    names = ("cross_entropy", "loss", FD) if selection.on_images else (FD,)
    return next((name for name in names if all(name in row.measured.figures for row in rows)), None)


def recommend(selection: Selection, size_bytes: int, files: Mapping[str, str] | None = None) -> list[Answer]:
    """One answer for each series. A size is that of the stored weights of the generator, without its decoder.

    Formats that no bundle can hold are not recommended. `files` maps models to their checkpoints, for the commands.
    """
    return [_of_series(selection, series, size_bytes, files or {}) for series in selection.series]


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The rows without those that repeat another: same model and bits, equal figures. The cheapest method stays.

    Fine-tuning that never got below its start gives its start's codes back; that is no other answer.
    """
    kept: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: _effort(row.run)):
        figures = tuple(sorted((name, figure["value"]) for name, figure in row.measured.figures.items()))
        cost = row.measured.cost
        kept.setdefault((row.run.model, row.run.number_format, cost["stored_bits"], cost["total_bits"], figures), row)
    return list(kept.values())


def _effort(run: Run) -> tuple[bool, int, str]:
    """Cheap methods first: those that do not train, in the order of `METHODS`, which combinations follow."""
    known = (NO_METHOD, *METHODS)
    return run.trained, known.index(run.method) if run.method in known else len(known), run.method


def _of_series(selection: Selection, series: str, size_bytes: int, files: Mapping[str, str]) -> Answer:
    rows = [row for run, row in selection.rows.items() if run.series == series and _exportable(run)]
    sizes = {row.key: row.measured.cost["stored_bits"] / 8 for row in rows}
    least = min(sizes.values(), default=0.0)
    fitting = [row for row in rows if sizes[row.key] <= size_bytes]
    name = quality_of(selection, rows)

    def nothing(words: str) -> Answer:
        return Answer(series, None, name or "", 0.0, (0.0, 0.0), 0.0, least, words, "")

    if not fitting:
        return nothing("nothing fits; the smallest takes")
    if name is None:
        return nothing("no figure compares sizes (sweep with --images or --fd); the smallest takes")
    ranked = sorted(distinct(fitting), key=lambda row: row.measured.figures[name]["value"])
    best = ranked[0]
    found = best.measured.figures[name]
    words = "the only one that fits" if len(ranked) == 1 else _against(name, best, ranked[1])
    low, high = found["ci95"]
    return Answer(
        series, best, label_of(name), found["value"], (low, high), sizes[best.key], least, words,
        command_for(best, files.get(best.run.model)), weights_of(best),
    )  # fmt: skip


def _against(name: str, best: Row, second: Row) -> str:
    low, high = difference(name, second, best)
    other = str(second.run)
    return f"yes, {other} is worse" if low > 0 else f"not shown: {other} ({low:+.2g} … {high:+.2g})"


def difference(name: str, a: Row, b: Row) -> tuple[float, float]:
    """The 95 % interval of a's figure minus b's: paired over images, FD as two normal distributions."""
    if name == FD:
        (x, dx), (y, dy) = (_normal(row) for row in (a, b))
        spread = float(np.hypot(dx, dy))
        return x - y - spread, x - y + spread
    figure = FIGURES[name]
    images = len(a.measured.per_image[figure.columns[0]])
    counts_RN = draws(images)
    return interval(
        resampled(figure, a.measured.per_image, counts_RN) - resampled(figure, b.measured.per_image, counts_RN)
    )


def _normal(row: Row) -> tuple[float, float]:
    """FD and the half-width of its interval."""
    found = row.measured.figures[FD]
    return float(found["value"]), float(found["ci95"][1] - found["value"])


def _exportable(run: Run) -> bool:
    return run.number_format == FULL or get_format(run.number_format).exportable
