"""`qexport quantize`: from a model's name to a bundle."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qexport.errors import InputError, UnsupportedError
from qexport.family import random_seed
from qexport.suggest import nearest
from qexport_cli.options import CheckpointOption, JsonOption, VaeCheckpointOption
from qexport_cli.progress import work
from qexport_cli.render import (
    Column,
    figure,
    number,
    print_facts,
    print_json,
    print_line,
    print_note,
    print_table,
    seconds,
    size,
    warning,
)
from qexport_cli.resources import peak_memory_bytes

if TYPE_CHECKING:
    from qexport.bundle import Bundle
    from qexport.family import ModelEntry
    from qexport.recipe import Recipe
    from qexport.scheme import Scheme

DEFAULT_WBITS = 4
DEFAULT_ABITS = 16
FP8_WBITS = 8
FORMATS = ("int", "fp8", "fp8-e5m2")
COMING_FORMATS = ("fp6", "fp4")


def quantize(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="A name that `qexport models` lists; or --checkpoint tells."),
    ] = None,
    wbits: Annotated[
        int | None, typer.Option(metavar="BITS", help="Bits of a weight: 2, 3, 4, 8, or 16 to keep them (default 4).")
    ] = None,
    abits: Annotated[
        int | None, typer.Option(metavar="BITS", help="Bits of an activation: 16, which keeps them (default 16).")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Weights that share a scale (default 32; 8 bits: a whole row).")
    ] = None,
    number_format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="int (default), fp8 (E4M3) or fp8-e5m2, both 8 bits wide."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="rtn", help="How codes are chosen: rtn rounds to nearest (default rtn).")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Layer by layer from a TOML file, instead of the above.")
    ] = None,
    checkpoint: CheckpointOption = None,
    vae_checkpoint: VaeCheckpointOption = None,
    random_weights: Annotated[
        int | None,
        typer.Option("--random-weights", metavar="SEED", help="Random numbers instead of weights; engineering only."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to (default ./qexport-out/<model>-<scheme>).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Quantise a model to an ONNX bundle, which runs without PyTorch."""
    start_s = time.perf_counter()
    choices = {
        "--wbits": wbits,
        "--abits": abits,
        "--group-size": group_size,
        "--format": number_format,
        "--method": method,
    }
    scheme, layer_by_layer = _choose(choices, recipe)

    from qexport.pipeline import quantize as run

    with work() as report:
        bundle = run(
            model,
            scheme=scheme,
            recipe=layer_by_layer,
            checkpoint=checkpoint,
            vae_checkpoint=vae_checkpoint,
            random_weights=random_weights,
            out=out,
            overwrite=overwrite,
            progress=report,
            loaded=lambda entry: _announce(entry, recognised=model is None),
        )
    spent_s = time.perf_counter() - start_s
    figures = _figures(bundle, spent_s)
    if json:
        print_json(figures)
    else:
        _show(bundle, figures)


def _announce(entry: ModelEntry, recognised: bool) -> None:
    """What one should know of the weights before anything is made of them."""
    if recognised:
        print_note(f"recognised: {entry.name}")
    if random_seed(entry.source) is not None:
        print_note(f"warning: {entry.source}")
    if entry.licence_note:
        print_note(entry.licence_note)


def _choose(choices: Mapping[str, Any], recipe: Path | None) -> tuple[Scheme | None, Recipe | None]:
    """The scheme that the options stand for, or the recipe from its file; contradictions are refused."""
    given = {option: value for option, value in choices.items() if value is not None}
    if recipe is not None:
        from qexport.recipe import Recipe

        if given:
            option = next(iter(given))
            raise InputError(f"--recipe says what {option} says, for each layer; leave {option} out, or edit {recipe}")
        return None, Recipe.from_toml(recipe)
    number_format = given.get("--format", FORMATS[0])
    wbits = given.get("--wbits", FP8_WBITS if number_format.startswith("fp8") else DEFAULT_WBITS)
    if number_format in COMING_FORMATS:
        raise UnsupportedError(f"--format {number_format} is not available yet; use {', '.join(FORMATS)}")
    if number_format not in FORMATS:
        known = (*FORMATS, *COMING_FORMATS)
        raise InputError(
            f"--format {number_format!r} is unknown{nearest(number_format, known)}; use {', '.join(FORMATS)}"
        )
    for option in ("--format", "--method"):
        if wbits == 16 and option in given:
            raise InputError(f"{option} {given[option]} has no meaning with --wbits 16, which keeps floating point")

    from qexport.algorithms import get_algorithm
    from qexport.scheme import preset

    get_algorithm(given.get("--method", "rtn"))
    return preset(wbits, given.get("--abits", DEFAULT_ABITS), given.get("--group-size"), number_format), None


def _figures(bundle: Bundle, spent_s: float) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "model": manifest.model.name,
        "source": manifest.model.source,
        "licence": manifest.model.licence,
        "scheme": manifest.scheme,
        "digest": manifest.digest,
        **manifest.totals,
        "size_bytes": sum(entry.size for entry in manifest.files.values()),
        "seconds": round(spent_s, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _show(bundle: Bundle, figures: Mapping[str, Any]) -> None:
    rows = [
        [
            name,
            number(figures.get(f"weights_{key}")),
            figure(figures.get(f"bits_per_weight_{key}")),
            size(figures.get(f"size_bytes_{key}")),
            _times_smaller(figures.get(f"share_of_fp16_{key}")),
        ]
        for name, key in (("quantised matrices", "quantized"), ("everything", "all"))
        if figures.get(f"weights_{key}")
    ]
    columns = (
        Column(f"{figures['model']} as {figures['scheme']}"),
        Column("weights", right=True),
        Column("bits/weight", right=True),
        Column("size", right=True),
        Column("against fp16", right=True),
    )
    print_table(columns, rows)
    print_line()
    memory = size(figures["peak_memory_bytes"])
    print_facts(
        {
            **warning(figures["source"]),
            "layers": f"{figures.get('layers_quantized', 0)} of {figures.get('layers', '?')} quantised",
            "took": seconds(figures["seconds"]) + (f", peak memory {memory}" if memory else ""),
            "bundle": f"{bundle.path} ({size(figures['size_bytes'])})",
        }
    )
    print_line()
    print_line("next:")
    print_line(f"  qexport verify {bundle.path}")
    print_line(f"  qexport generate {bundle.path}")


def _times_smaller(share: float | None) -> str | None:
    return f"{1 / share:.2f}× smaller" if share else None
