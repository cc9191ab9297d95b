"""`qexport lower`: add graphs that were rewritten for one provider to a bundle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.errors import InputError
from qexport_cli.options import JsonOption
from qexport_cli.progress import work
from qexport_cli.render import Column, print_facts, print_json, print_line, print_table, print_wrapped, size

if TYPE_CHECKING:
    from qexport.lower import LowerReport

COLUMNS = (Column("graph"), Column("rewrite"), Column("places", right=True), Column("left alone", right=True))

CHOICE_COLUMNS = (Column("stored as"), Column("runs as"), Column("layers", right=True), Column("because", fold=True))


def lower(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="A bundle; the newest under ./qexport-out if left out.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", metavar="ort-cpu|ort-cuda|tensorrt", help="Where the graphs are to run.")
    ] = "ort-cuda",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="float16|float32", help="What they compute in; the target has a default."),
    ] = None,
    decoder_dtype: Annotated[
        str,
        typer.Option(
            "--decoder-dtype",
            metavar="float32|float16",
            help="What the decoder of latents computes in; float16 is refused where its numbers do not fit.",
        ),
    ] = "float32",
    optimize: Annotated[
        str | None,
        typer.Option(
            "--optimize", metavar="latency|memory|balanced", help="Choose each layer's form by what was measured."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time that --optimize is for.")] = 1,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table of --optimize, from `qexport bench --calibrate-device`."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Rewrite a bundle's graphs for one provider.

    They lie beside the portable ones. Weights whose bytes do not change are shared. Graphs of the same target are
    replaced. With --optimize, layers whose codes are slower than floating point on that device are dequantised when
    a session is made; numbers stay the same.
    """
    if optimize is None and table is not None:
        raise InputError("--table goes with --optimize")
    from qexport.bundle import Bundle
    from qexport.lower import lower as run

    path = bundle if bundle is not None else Bundle.newest()
    with work() as progress:
        report = run(
            path,
            target,
            dtype=dtype,
            optimize=optimize,
            batch=batch,
            table=table,
            progress=progress,
            decoder_dtype=decoder_dtype,
        )
    if json:
        print_json(report.to_json())
        return
    rows = [
        (graph, name, count.rewritten or None, sum(count.refused.values()) or None)
        for graph, rewrites in report.graphs.items()
        for name, count in rewrites.items()
        if count.rewritten or count.refused
    ]
    if rows:
        print_table(COLUMNS, rows)
        print_line()
        for note in _notes(report):
            print_wrapped(note)
        print_line()
    if report.choices:
        from qexport.lower.choose import summary

        counted = [(*key[:2], count, key[2]) for key, count in summary(report.choices).items()]
        print_table(CHOICE_COLUMNS, counted)
        print_line()
    print_facts(_facts(report))
    print_line(str(path))


def _notes(report: LowerReport) -> list[str]:
    """Why places were left alone, each reason once."""
    reasons: dict[str, Counter[str]] = {}
    for rewrites in report.graphs.values():
        for name, count in rewrites.items():
            for reason, places in count.refused.items():
                reasons.setdefault(name, Counter())[reason] += places
    return [
        f"{name}, left alone: " + "; ".join(f"{reason} ({places})" for reason, places in found.items())
        for name, found in reasons.items()
    ]


def _facts(report: LowerReport) -> dict[str, object]:
    files = ", ".join(file.rpartition("/")[2] for file in report.files)
    facts: dict[str, object] = {
        "target": f"{report.target}, computes in {report.dtype}",
        "added": f"{size(report.added_bytes)}, of which {size(report.weights_bytes)} are weights that changed",
        "files": files or "none: nothing was to be rewritten, the portable graphs are used",
    }
    found = report.decoder_range
    if found is not None:
        drawn = f"{found.images} images" + (f" by {found.schedule}" if found.schedule else "")
        facts["decoder"] = (
            f"{report.decoder_dtype}; reaches {found.greatest:,.1f} of {found.limit:,.0f} at {found.node}, on {drawn}"
        )
    if report.aim:
        facts["chosen for"] = (
            f"{report.aim['optimize']}, batch {report.aim['batch']}, by the table of {report.aim['device']}"
        )
        facts["every layer"] = f"reports/lower-{report.target}.json"
    if report.provider != "cpu":
        facts["speed"] = f"not measured on {report.provider.upper()} here"
    return facts
