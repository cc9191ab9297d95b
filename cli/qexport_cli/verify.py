"""`qexport verify`: prove that a bundle computes what the model computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qexport.errors import InputError
from qexport_cli.files import check_file, new_file
from qexport_cli.options import CheckpointOption, JsonOption, ProviderOption, VaeCheckpointOption, check_pair
from qexport_cli.progress import work
from qexport_cli.render import print_json, print_note


def verify(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", help="A bundle; the newest under ./qexport-out if left out.")
    ] = None,
    provider: ProviderOption = "auto",
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Trajectories that are compared; the model has a default of its own."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the trajectories.")] = 0,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="Diffusion: schedule of the trajectories, such as ddim-25.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Verify the graphs that `qexport lower` made for this target.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Compare every n-th step only.")] = 1,
    images: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Real images for the quality figures, not the model's own.")
    ] = None,
    quality: Annotated[bool, typer.Option("--quality", help="Also the Fréchet distance of generated images.")] = False,
    fd_images: Annotated[int, typer.Option(min=2, metavar="N", help="Images that --quality draws.")] = 1000,
    max_kl: Annotated[float | None, typer.Option(min=0, metavar="X", help="Fail above this KL divergence.")] = None,
    max_fd: Annotated[float | None, typer.Option(min=0, metavar="X", help="Fail above this Fréchet distance.")] = None,
    inception: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --quality: measure FID, by these weights (qexport[fid]).")
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="With --inception: .npz with mu and sigma, or real images; may be repeated."),
    ] = None,
    checkpoint: CheckpointOption = None,
    vae_checkpoint: VaeCheckpointOption = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the HTML report here too, not only in reports/."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Prove that a bundle computes what the model computed.

    Exits with 1 if a limit is breached, and says which, where, and by how much.
    """
    from qexport.bundle import Bundle

    path = bundle if bundle is not None else Bundle.newest()
    if html is not None:
        check_file("--html", html)
    if inception is not None and not quality:
        raise InputError("--inception measures images that --quality draws; pass that too")
    check_pair(inception, reference)

    with work() as progress:
        from qexport.verify.ladder import verify as run
        from qexport.verify.report_files import SKIPPED

        extractor = None
        if inception is not None:
            from qexport.verify.inception_run import open_extractor

            side = Bundle.open(path).manifest.model.image_size
            extractor = open_extractor(
                inception, reference or [], (side, side), batch=batch, provider=provider, progress=progress
            )
        report = run(
            path,
            provider=provider,
            samples=samples,
            batch=batch,
            seed=seed,
            schedule=schedule,
            target=target,
            images=images,
            every=every,
            quality=quality,
            fd_images=fd_images,
            extractor=extractor,
            max_kl=max_kl,
            max_fd=max_fd,
            checkpoint=checkpoint,
            vae_checkpoint=vae_checkpoint,
            progress=progress,
        )
    data: dict[str, Any] = report.to_json()
    for lost in (rung for rung in data["skipped"] if rung["name"] == SKIPPED):
        print_note(f"skipped: {lost['name']}: {lost['reason']}")
    if html is not None:
        from qexport.verify.report_html import render

        with new_file(html) as partial:
            partial.write_text(render(report), encoding="utf-8")
    if json:
        print_json(data)
    else:
        from qexport_cli.verify_tables import show

        show(data, path, report.html)
    if not report.passed:
        print_note(f"error: {path}: {breach(data)}")
        raise typer.Exit(1)


def breach(data: Mapping[str, Any]) -> str:
    """One line for the first check that failed: where, which figure, which limit."""
    failed = [check for check in data.get("checks", ()) if check.get("passed") is False]
    if not failed:
        return "a check failed"
    first = failed[0]
    detail = str(first.get("detail") or "")
    names = [(key, str(first[key])) for key in ("graph", "node") if first.get(key)]
    place = "".join(f", {key} {name}" for key, name in names if not detail.startswith(f"{name}:"))
    unit = f" {first['unit']}" if first.get("unit") else ""
    value = first.get("value")
    measured = "" if value is None else f" is {value:.3g}{unit}, the limit is {first['limit']:g}"
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return f"{first['name']}{place}{measured}{detail and f': {detail}'}{more}"
