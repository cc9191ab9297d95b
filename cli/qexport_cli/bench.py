"""`qexport bench`: how fast bundles are and what they take, beside floating point and torch, in one run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport.errors import InputError
from qexport_cli.files import check_file, new_file
from qexport_cli.options import CheckpointOption, JsonOption, ProviderOption, VaeCheckpointOption
from qexport_cli.progress import work
from qexport_cli.render import (
    Column,
    figure,
    number,
    print_facts,
    print_json,
    print_line,
    print_table,
    seconds,
    size,
)

if TYPE_CHECKING:
    from qexport.bench.calibrate import Calibrated
    from qexport.bench.report import Batch, BenchReport

NOTHING = "none"
"""`--against none` measures the bundles alone."""

SPEED_COLUMNS = (
    Column("contender", shorten=True),
    Column("batch", right=True),
    Column("ms", right=True),
    Column("p25–p75", right=True),
    Column("min–max", right=True, wide_only=True),
    Column("images/s", right=True),
    Column("× fp32", right=True),
    Column("× fp16", right=True),
    Column("× compile", right=True),
    Column("× eager", right=True, wide_only=True),
)
GRAPH_COLUMNS = (
    Column("contender", shorten=True),
    Column("batch", right=True),
    Column("graph"),
    Column("ms", right=True),
    Column("flops", right=True),
    Column("moved", right=True),
    Column("bound by"),
    Column("floor ms", right=True, wide_only=True),
    Column("reached", right=True),
)
MEMORY_COLUMNS = (
    Column("contender", shorten=True),
    Column("load", right=True),
    Column("session memory", right=True),
    Column("peak", right=True),
    Column("device", right=True),
    Column("files", right=True),
)
CALIBRATION_COLUMNS = (
    Column("form"),
    Column("inputs", right=True),
    Column("outputs", right=True),
    Column("µs at rows", fold=True),
)


def bench(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[BUNDLE…]", help="Bundles of one model; the newest under ./qexport-out if left out."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Batch sizes.")] = "1,8",
    provider: ProviderOption = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", metavar="NAME", help="Lowered graphs to measure, or portable; again for more. Default: all."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads of each contender.")] = None,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs that count, for each batch size.")] = 10,
    warm_up: Annotated[int, typer.Option(min=0, metavar="N", help="Runs before them that do not.")] = 2,
    against: Annotated[
        str, typer.Option(metavar="LIST", help="References: any of fp32,fp16,eager,compile; or none.")
    ] = "fp32,fp16,eager,compile",
    schedule: Annotated[str | None, typer.Option(metavar="NAME", help="Diffusion: schedule, such as ddim-25.")] = None,
    calls: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Play only the first N calls of graphs, not whole images.")
    ] = None,
    checkpoint: CheckpointOption = None,
    vae_checkpoint: VaeCheckpointOption = None,
    calibrate_device: Annotated[
        bool, typer.Option("--calibrate-device", help="Measure this device's table of forms, for `lower --optimize`.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --calibrate-device: where its table goes.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure speed, memory and load time of bundles.

    Beside them run floating point and torch. All take turns in one run, each in a process of its own. The report also
    goes to reports/bench.json.
    """
    if out is not None and not calibrate_device:
        raise InputError("--out goes with --calibrate-device; without it the report lies in the bundle")
    if calibrate_device:
        if bundles:
            raise InputError("--calibrate-device measures the device, not a bundle; leave the bundle out")
        if out is not None:
            check_file("--out", out)
        _calibrate(provider, threads, out, json)
        return
    from qexport.bundle import Bundle

    paths = bundles or [Bundle.newest()]
    with work() as progress:
        from qexport.bench.run import bench as run

        report = run(
            paths,
            batches=_numbers(batch),
            provider=provider,
            targets=target,
            threads=threads,
            runs=runs,
            warm_up=warm_up,
            against=() if against.strip() == NOTHING else [name.strip() for name in against.split(",")],
            schedule=schedule,
            calls=calls,
            checkpoint=checkpoint,
            vae_checkpoint=vae_checkpoint,
            progress=progress,
        )
    if json:
        print_json(report.to_json())
    else:
        _show(report)
    failed = [row for row in report.rows if row.failed and not row.contender.optional]
    if failed:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise InputError(f"--batch {text!r}: write whole numbers from 1 on, such as 1,8")
    return [int(part) for part in parts]


def _show(report: BenchReport) -> None:
    rows = [(row, count, batch) for row in report.rows for count, batch in row.batches.items()]
    print_table(SPEED_COLUMNS, [_speed(row.contender.name, count, batch) for row, count, batch in rows])
    print_line()
    lines = [line for row, count, batch in rows for line in _graphs(row.contender.name, count, batch)]
    if lines:
        print_table(GRAPH_COLUMNS, lines)
        print_line()
    print_table(
        MEMORY_COLUMNS,
        [
            (
                row.contender.name,
                None if row.load_s is None else seconds(row.load_s),
                size(row.held.session),
                size(row.held.peak),
                size(row.held.device),
                size(row.contender.file_bytes),
            )
            for row in report.rows
        ],
    )
    print_line()
    settings, ceilings = report.settings, report.ceilings
    facts: dict[str, object] = {
        "played": f"{settings['played']}, {settings['runs']} runs in turns after {settings['warm_up']} that do not "
        f"count; serve options; {settings['threads'] or 'default'} threads",
        "memory": "above an empty process that has imported the runtime",
    }
    if ceilings is not None:
        flops, moved = number(ceilings.flops_per_s), number(ceilings.bytes_per_s)
        facts["device"] = f"{flops}flop/s in {ceilings.dtype}, {moved}B/s, measured in this run"
    facts |= {f"without {name}": reason for name, reason in report.left_out.items()}
    facts |= {f"{row.contender.name} failed": row.failed for row in report.rows if row.failed and row.batches == {}}
    print_facts(facts)
    for sentence in report.words():
        print_line(sentence)


def _speed(name: str, count: int, batch: Batch) -> tuple[object, ...]:
    total = batch.spreads["total"]
    ratios = (batch.ratios.get(base) for base in ("fp32", "fp16", "torch.compile", "torch eager"))
    return (
        name,
        count,
        figure(total.median),
        f"{figure(total.quarter, 3)}–{figure(total.three_quarters, 3)}",
        f"{figure(total.least, 3)}–{figure(total.greatest, 3)}",
        figure(batch.images_per_s, 3),
        *(None if ratio is None else f"{ratio.median:.2f}" for ratio in ratios),
    )


def _graphs(name: str, count: int, batch: Batch) -> Iterable[tuple[object, ...]]:
    for graph, line in batch.rooflines.items():
        yield (
            name,
            count,
            graph,
            figure(batch.spreads[graph].median, 3),
            number(line.flops),
            size(line.bytes),
            line.bound,
            figure(line.floor_ms, 3),
            f"{line.share:.0%}",
        )


def _calibrate(provider: str, threads: int | None, out: Path | None, json: bool) -> None:
    with work() as progress:
        from qexport.bench.calibrate import calibrate

        found: Calibrated = calibrate(provider, threads, progress=progress)
    path = out or found.path
    with new_file(path) as partial:
        partial.write_text(found.table.dumps(), encoding="utf-8")
    if json:
        print_json(found.table.to_json())
        return
    rows = [
        (form, inputs, outputs, "  ".join(f"{rows}: {figure(us, 3)}" for rows, us in times.items()))
        for (form, inputs, outputs), times in found.table.by_shape().items()
    ]
    print_table(CALIBRATION_COLUMNS, rows)
    print_line()
    facts = {f"without {form}": reason for form, reason in found.failed.items()}
    print_facts({"device": found.table.device, "table": path, **facts})
