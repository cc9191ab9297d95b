"""How sweeps look in a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qexport_cli.render import Column, console, figure, print_json, print_line, print_table, size

if TYPE_CHECKING:
    from qexport.scaling.findings import Finding
    from qexport.scaling.recommend import Answer
    from qexport.scaling.select import Selection
    from qexport_cli.scaling_choice import Choice

_FIGURES = ("kl", "top1_agreement", "cross_entropy", "output_mse", "loss", "trajectory_error", "fd")
_HEADS = {
    "kl": "KL", "top1_agreement": "top-1", "cross_entropy": "CE", "output_mse": "output err.", "loss": "loss",
    "trajectory_error": "traj. err.", "fd": "FD",
}  # fmt: skip


_IN_TERMINAL = re.compile(r"Best width, |Levels gained, .*(KL|output error)")
"""Topics that are printed; the page has all."""


def show_plan(chosen: Choice, json: bool) -> None:
    """The runs, and what was left out."""
    runs = [{"model": r.model, "format": r.number_format, "bits": r.bits, "method": r.method} for r in chosen.runs]
    if json:
        dropped = [vars(item) for item in chosen.dropped]
        print_json({"runs": runs, "left_out": dropped, "measurement": vars(chosen.how)})
        return
    columns = (Column("model"), Column("format"), Column("method"))
    print_table(columns, [(r["model"], r["format"], r["method"]) for r in runs], f"{len(runs)} runs")
    for item in chosen.dropped:
        print_line(f"left out: {item.what} ({item.reason})")


def show_result(selection: Selection, found: Sequence[Finding]) -> None:
    """One table a series: every run with its size and figures; then the findings that their intervals decide."""
    for series in selection.series:
        rows = [row for run, row in selection.rows.items() if run.series == series]
        rows.sort(key=lambda row: (row.measured.cost["parameters"], -row.run.bits, row.run.number_format))
        names = [name for name in _FIGURES if any(name in row.measured.figures for row in rows)]
        columns = [Column("model"), Column("format"), Column("method"), Column("size", right=True)]
        columns += [Column(_HEADS[name], right=True) for name in names]
        cells = [
            (
                row.run.model,
                row.run.number_format,
                row.run.method,
                size(row.measured.cost["stored_bits"] / 8),
                *(_value(row.measured.figures.get(name)) for name in names),
            )
            for row in rows
        ]
        print_table(columns, cells, series)
        print_line()
    topic = ""
    for item in found:
        if item.shown and _IN_TERMINAL.match(item.topic):
            if item.topic != topic:
                _wrapped(item.topic, "bold")
                topic = item.topic
            _wrapped(f"- {item.text}")
    print_line()


def show_recommendation(answers: Sequence[Answer], size_bytes: int) -> None:
    """The best of each series within the budget, whether the next is worse, and the commands that make them."""
    columns = (
        Column("series"), Column("model"), Column("format"), Column("method"), Column("size", right=True),
        Column("quality", right=True), Column("95 %", right=True),
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for answer in answers:
        run = answer.row.run if answer.row else None
        if run is None:
            rows.append((answer.series, *[None] * 6))
            continue
        interval = "–".join(str(figure(end)) for end in answer.interval)
        rows.append(
            (answer.series, run.model, run.number_format, run.method, size(answer.size_bytes), figure(answer.value),
             interval)
        )  # fmt: skip
    title = f"Within {size(size_bytes)} of weights, decoder not counted"
    if any(answer.row is not None for answer in answers):
        print_table(columns, rows, title)
        print_line()
    else:
        print_line(title)
    for answer in answers:
        if answer.row is None:
            _wrapped(f"{answer.series}: {answer.words} {size(answer.least_bytes)}")
        else:
            _wrapped(f"{answer.series}, by {answer.figure}: better than the next? {answer.words}")
    for answer in answers:
        if answer.command:
            print_line(answer.command)
    for answer in answers:
        if answer.weights:
            _wrapped(answer.weights)


def _wrapped(text: str, style: str = "") -> None:
    console().print(Text(text, style=style))


def _value(found: Any) -> str | None:
    return None if found is None else figure(found["value"], 3)
