"""`qexport scaling`: which size at how many bits; sweeps, and what follows from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qexport.errors import InputError
from qexport_cli.options import JsonOption, check_pair
from qexport_cli.progress import work
from qexport_cli.render import print_json, print_line, print_note
from qexport_cli.scaling_choice import choose, parse_checkpoints, parse_size
from qexport_cli.scaling_tables import show_plan, show_recommendation, show_result

if TYPE_CHECKING:
    from qexport.scaling.sweep import Outcome, Task
    from qexport_cli.scaling_choice import Choice

DEFAULT_OUT = Path("qexport-out") / "scaling"
STORE = "runs.sqlite"


def scaling(
    families: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Series of models (default var-c10,dit-c10), all sizes of each.")
    ] = None,
    models: Annotated[str | None, typer.Option(metavar="A,B,…", help="Single models instead of series.")] = None,
    wbits: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Widths of weights (default 2,3,4,6,8,16; 16 is fp16).")
    ] = None,
    formats: Annotated[
        str | None, typer.Option(metavar="A,B", help="int: 2,3,4,6,8 bits; fp: 4,6,8 bits (default int,fp).")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="As of quantize --method, and topkld (default rtn,gptq).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Real images (.npz or folder); else the model draws its own.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Images that are judged (default 500; a denoiser's are half).")
    ] = None,
    fd: Annotated[int | None, typer.Option(metavar="N", help="Images generated for FD (default 500; 0: none).")] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure FID in place of FD, by these weights (qexport[fid]).")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="With --inception: .npz with mu and sigma, or real images; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of all that is drawn.")] = 0,
    topkld_steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Updates of fine-tuning with topkld, of 8 samples each (default 400)."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where models are judged, sampled and trained: cpu or cuda.")
    ] = "cpu",
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Weights of a model that is not bundled; may be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes, int 2,3,4,8, few images: some minutes.")] = False,
    jobs: Annotated[int, typer.Option(metavar="N", help="Processes that share the runs (of each machine).")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Share them over a Ray cluster instead (qexport[ray]).")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be run, and stop.")] = False,
    from_store: Annotated[bool, typer.Option("--from-store", help="Run nothing; write the results anew.")] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Run nothing; the best of the store within this: 3MB, 800kB.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For results (default ./qexport-out/scaling).")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Store of runs (default runs.sqlite in the folder of results).")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the findings as Markdown.")] = None,
    json: JsonOption = False,
) -> None:
    """Say which size of model at how many bits is best.

    Measures models of many sizes at many bits; what was measured lies in a store, and is not measured again.
    """
    folder = out or DEFAULT_OUT
    path = store or folder / STORE
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: at least 1 process is needed")
    if budget is not None:
        _recommend(path, parse_size(budget), checkpoint or [], json)
        return
    if from_store:
        _write(path, folder, report, None, None, json)
        return
    check_pair(inception, reference)
    chosen = choose(
        {
            "--families": families, "--models": models, "--wbits": wbits, "--formats": formats, "--methods": methods,
            "--images": images, "--samples": samples, "--fd": fd, "--topkld-steps": topkld_steps,
        },
        checkpoint or [], seed, quick, inception, reference or [],
    )  # fmt: skip
    if plan:
        show_plan(chosen, json)
        return
    for item in chosen.dropped:
        print_note(f"left out: {item.what} ({item.reason})")
    task, outcome = _sweep(chosen, path, folder, jobs, ray, _checked(device))
    for run, message in outcome.failed.items():
        print_note(f"failed: {run}: {message}")
    _write(path, folder, report, task, outcome, json)
    if not outcome.complete:
        raise typer.Exit(1)


def _checked(device: str) -> str:
    if device == "cpu":
        return device  # without importing torch
    from qexport.reference.device import choose_device

    return choose_device(device, "--device")


def _sweep(chosen: Choice, path: Path, folder: Path, jobs: int, ray: bool, device: str) -> tuple[Task, Outcome]:
    from qexport.scaling.measure import Files, measure
    from qexport.scaling.sweep import Task, digests_of, keyed, sweep, threads_for

    folder.mkdir(parents=True, exist_ok=True)
    files = Files(
        None if chosen.images is None else os.path.abspath(chosen.images),  # noqa: PTH100 — links stay as given
        tuple(chosen.checkpoints.items()),
        os.path.abspath(folder / "work"),  # noqa: PTH100
        None if chosen.inception is None else os.path.abspath(chosen.inception),  # noqa: PTH100
        tuple(map(os.path.abspath, chosen.reference)),
        device,
    )
    with work() as progress:
        progress("models", 0, 1)
        models = list(dict.fromkeys(run.model for run in chosen.runs))
        runs = keyed(chosen.runs, digests_of(models, files), chosen.how)
        task = Task(runs, chosen.how, files, str(path), measure, threads_for(jobs))
        if ray:
            from qexport.scaling.on_ray import sweep_on_ray

            return task, sweep_on_ray(task, progress)
        return task, sweep(task, jobs, lambda name, done, total: progress("runs", done, total))


def _write(
    path: Path, folder: Path, report: Path | None, task: Task | None, outcome: Outcome | None, json: bool
) -> None:
    from qexport.scaling.output import write_results
    from qexport.scaling.select import select
    from qexport.scaling.store import Store

    with Store(path, create=False) as store:
        selection = select(store.rows(), task.how if task else None)
    files, found = write_results(selection, folder, report)
    data: dict[str, Any] = {"store": str(path), "files": [str(file) for file in files]}
    if outcome is not None:
        data |= {"made": outcome.made, "found": outcome.found, "failed": dict(outcome.failed)}
        data |= {"elsewhere": list(outcome.elsewhere)}
    if json:
        findings = [vars(item) for item in found]
        print_json(data | {"runs": [_plain(row) for row in selection.rows.values()], "findings": findings})
        return
    show_result(selection, found)
    if outcome is not None:
        print_line(f"{outcome.made} runs made, {outcome.found} were in the store")
        for name in outcome.elsewhere:
            print_note(f"not done, another process has it or was stopped: {name}")
    for file in files:
        print_line(f"wrote {file}")


def _recommend(path: Path, size_bytes: int, checkpoint: list[str], json: bool) -> None:
    from qexport.scaling.recommend import recommend
    from qexport.scaling.select import select
    from qexport.scaling.store import Store

    with Store(path, create=False) as store:
        selection = select(store.rows())
    found = recommend(selection, size_bytes, parse_checkpoints(checkpoint))
    if json:
        print_json({"budget_bytes": size_bytes, "answers": [answer.to_json() for answer in found]})
        return
    show_recommendation(found, size_bytes)


def _plain(row: Any) -> dict[str, Any]:
    run = row.run
    return {
        "key": row.key, "model": run.model, "format": run.number_format, "bits": run.bits, "method": run.method,
        "figures": row.measured.figures, "cost": row.measured.cost, "wall_s": row.wall_s,
    }  # fmt: skip
