"""`qexport score`: FID and Inception Score of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qexport_cli.files import check_file, new_file
from qexport_cli.options import JsonOption, ProviderOption
from qexport_cli.progress import work
from qexport_cli.render import figure, print_facts, print_json, print_line, print_note

if TYPE_CHECKING:
    from qexport.verify.inception_run import Scores


def score(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES", help="Folders of images or .npz files, together one set."),
    ],
    inception: Annotated[Path, typer.Option(metavar="FILE", help="Weights: pt_inception-2015-12-05-6726825d.pth.")],
    reference: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="For FID: .npz with mu and sigma, or real images; may be repeated."),
    ] = None,
    splits: Annotated[int, typer.Option(metavar="N", min=1, help="Parts of the Inception Score.")] = 10,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images at a time; bounds the memory.")] = 50,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the bootstrap.")] = 0,
    provider: ProviderOption = "auto",
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write mean and covariance of IMAGES here, to be a --reference.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure FID and Inception Score of images.

    Such as `qexport generate --separate DIR` writes. Needs qexport[fid]. Without --reference only the Inception Score
    is measured.
    """
    if save is not None:
        check_file("--save", save, ".npz")
    with work() as progress:
        from qexport.verify.inception_run import score as run
        from qexport.verify.statistics import write_statistics

        found = run(
            images, inception, reference or [], splits=splits, batch=batch, seed=seed, provider=provider,
            progress=progress,
        )  # fmt: skip
        if save is not None:
            with new_file(save) as partial, partial.open("wb") as file:
                write_statistics(file, found.statistics, found.weights_sha256)
    for note in found.notes:
        print_note(f"note: {note}")
    if json:
        print_json(found.to_json() | ({"saved": str(save)} if save is not None else {}))
        return
    show(found)
    if save is not None:
        print_line(f"wrote {save}")


def show(found: Scores) -> None:
    """Print the figures with their intervals."""
    height, width = found.size
    score, count = found.inception_score, f"n = {found.inception_score.images:,}"
    facts: dict[str, object] = {"images": f"{score.images:,} of {width}×{height}, {found.images}"}
    if found.fid is not None:
        interval = f"{figure(found.fid.low)} – {figure(found.fid.high)}"
        facts["reference"] = found.reference
        facts[found.label] = f"{figure(found.fid.value)}  ({interval}; {found.features}, {count})"
    interval = f"{figure(score.low)} – {figure(score.high)}"
    parts = "in one part" if score.splits == 1 else f"± {figure(score.deviation)} over {score.splits} parts"
    facts["IS"] = f"{figure(score.value)} {parts}  ({interval}; {found.features}, {count})"
    print_facts(facts)
    print_line("Intervals are 95 %, by bootstrap.")
