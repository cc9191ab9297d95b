"""`qexport ship`: hand a bundle to another engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qexport.errors import InputError
from qexport.suggest import nearest
from qexport_cli.files import check_file
from qexport_cli.options import JsonOption
from qexport_cli.progress import work
from qexport_cli.render import print_facts, print_json, print_line, size

if TYPE_CHECKING:
    from qexport.bundle import Bundle

TARGETS = ("triton", "onnx")


def ship(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `qexport quantize` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="triton: a new folder; onnx: a file NAME.onnx.")],
    to: Annotated[str, typer.Option("--to", metavar="triton|onnx", help="A model repository, or one ONNX file.")],
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="Diffusion: another schedule of the bundle, such as ddim-25.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="triton: name of the model; the bundle's else.")
    ] = None,
    max_batch: Annotated[int, typer.Option(metavar="N", min=2, help="triton: most images in a batch.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="onnx: replace the file if it is there.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a bundle in the shape that another engine loads.

    triton: a model repository for the Triton Inference Server: a model for each graph, and one that plays the plan.
    onnx: the sampling plan unrolled into one file, for servers that run a single graph (VAR, or few diffusion steps).
    """
    if to not in TARGETS:
        raise InputError(f"--to {to}: not known{nearest(to, TARGETS)}; one of {', '.join(TARGETS)}")
    from qexport.bundle import Bundle

    if to == "onnx":
        check_file("OUT", out, ".onnx")
    with work() as report:
        report("check", 0, 1)
        opened = Bundle.open(bundle)
        report("check", 1, 1)
        facts = (
            _onnx(opened, out, schedule, overwrite) if to == "onnx" else _triton(opened, out, schedule, name, max_batch)
        )
    if json:
        print_json({"out": str(out), "to": to, "bundle": str(bundle), **facts})
        return
    texts = {key: _text(value) for key, value in facts.items() if key != "size_bytes"}
    print_facts({**texts, "size": size(facts["size_bytes"])})
    print_line(str(out))


def _text(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):  # noise: how many numbers each input takes
        return ", ".join(f"{name}: {count:,} numbers an image" for name, count in value.items())
    return value


def _onnx(bundle: Bundle, out: Path, schedule: str | None, overwrite: bool) -> dict[str, Any]:
    from qexport.ship.onnx_file import write_onnx

    shipped = write_onnx(bundle, out, schedule, overwrite)
    return {
        "calls": shipped.calls,
        "nodes": shipped.nodes,
        "noise": shipped.noise,
        "files": [str(file) for file in shipped.files],
        "size_bytes": sum(file.stat().st_size for file in shipped.files),
    }


def _triton(bundle: Bundle, out: Path, schedule: str | None, name: str | None, max_batch: int) -> dict[str, Any]:
    from qexport.ship.triton import write_repository

    made = write_repository(bundle, out, name=name, schedule=schedule, max_batch=max_batch)
    return {"models": list(made.models), "size_bytes": made.size_bytes}
