"""`qexport generate`: draw images with a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qexport.errors import InputError
from qexport_cli.files import check_file, check_folder
from qexport_cli.options import JsonOption, ProviderOption, parse_classes, parse_settings
from qexport_cli.progress import Report, work
from qexport_cli.render import print_facts, print_json, print_line, seconds, warning

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qexport.runtime import Runtime

MAX_IMAGES = 10_000
DEFAULT_OUT = Path("grid.png")


def generate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `qexport quantize` wrote.")],
    classes: Annotated[
        str | None, typer.Option(metavar="LIST", help="Class numbers: 1,8 or 0-9; all of them if left out.")
    ] = None,
    n: Annotated[
        int, typer.Option("--n", metavar="N", min=1, max=MAX_IMAGES, help="Images in all; classes take turns.")
    ] = 16,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Image i depends on seed, i, its class and the settings.")
    ] = 0,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The grid; a file that is there is replaced.")] = DEFAULT_OUT,
    separate: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every image by itself too, never enlarged.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=64, help="Enlarge the grid's images; small ones are anyway.")
    ] = None,
    cfg: Annotated[
        float | None, typer.Option(metavar="X", help="Strength of guidance; the bundle has a default.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Draw from this many most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="X", help="Draw from the tokens that hold this much probability.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Below 1 is more cautious, above 1 bolder.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other input of the sampling plan.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="Diffusion: another schedule of the bundle, such as ddim-25.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run the graphs that `qexport lower` made for this target.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Most images at a time; bounds the memory.")] = 16,
    provider: ProviderOption = "auto",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; one per core if left out.")
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="On CUDA: record each graph once and play it back; faster.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Draw images with a bundle, as a PNG grid.

    The same command on the same machine gives the same file, byte for byte. Another --batch draws with the same noise,
    but kernels round differently by batch, so that now and then a token, and with it an image, comes out otherwise.
    """
    named = {"cfg": cfg, "top_k": top_k, "top_p": top_p, "temperature": temperature}
    inputs: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    given = parse_settings(settings or [])
    if both := sorted(given.keys() & inputs.keys()):
        raise InputError(f"--set {both[0]}: given as an option of its own too")
    inputs |= given
    _check_destination(out, separate)

    from qexport.runtime import load
    from qexport.runtime.pixels import grid
    from qexport_cli.pictures import default_scale, write_png

    with work() as report:
        report("load", 0, 1)
        runtime = load(bundle, provider=provider, threads=threads, target=target, cuda_graphs=cuda_graphs)
        report("load", 1, 1)
        model = runtime.bundle.manifest.model
        count = model.num_classes
        turns = parse_classes(classes, count) if classes is not None else list(range(count))
        labels = [turns[i % len(turns)] for i in range(n)]
        start_s = time.perf_counter()
        pixels_NHWC = _draw(runtime, labels, inputs, seed=seed, batch=batch, schedule=schedule, report=report)
        spent_s = time.perf_counter() - start_s
        texts = _texts(runtime, labels, seed, inputs)
        files: list[Path] = []
        if separate is not None:
            separate.mkdir(parents=True, exist_ok=True)
            for i, (label, image) in enumerate(zip(labels, pixels_NHWC, strict=True)):
                files.append(separate / f"{i:05d}-class{label}.png")
                write_png(files[-1], image, {**texts, "classes": str(label), "image": str(i)})
        write_png(out, grid(pixels_NHWC, scale or default_scale(pixels_NHWC.shape[2])), texts)

    if json:
        print_json(
            {
                "out": str(out), "separate": [str(file) for file in files], "bundle": str(bundle),
                "model": model.name, "source": model.source, "seed": seed, "classes": labels, "inputs": inputs,
                "batch": batch, "provider": runtime.provider, "seconds": round(spent_s, 3),
                "cuda_graphs": cuda_graphs, "uncaptured": list(runtime.uncaptured),
            }
        )  # fmt: skip
        return
    print_facts(
        {
            **warning(model.source),
            "images": f"{n} in {seconds(spent_s)} on {runtime.provider} ({spent_s / n * 1000:.3g} ms each)",
            "seed": seed,
            **({"no CUDA graph": ", ".join(runtime.uncaptured)} if runtime.uncaptured else {}),
            **({"separate": f"{len(files)} files in {separate}"} if separate is not None else {}),
        }
    )
    print_line(str(out))


def _draw(
    runtime: Runtime, labels: list[int], inputs: dict[str, Any], report: Report, schedule: str | None, **how: int
) -> npt.NDArray[np.uint8]:
    """Draw everything, keeping bytes rather than floats."""
    import numpy as np

    from qexport.runtime.inputs import label_input, to_arrays
    from qexport_cli.pictures import finite_pixels

    plan = runtime.bundle.plan
    port = label_input(plan)
    if port is not None and port.name in inputs:
        raise InputError(f"--set {port.name}: classes are given with --classes")
    to_arrays(plan, inputs)  # refuses unknown names, before they could be mistaken for arguments of `batches`
    options: dict[str, Any] = {**inputs, **how, **({"schedule": schedule} if schedule is not None else {})}
    batches = runtime.batches(labels, progress=lambda done, total: report("draw", done, total), **options)
    return np.concatenate([finite_pixels(images) for images in batches])


def _texts(runtime: Runtime, labels: list[int], seed: int, inputs: dict[str, Any]) -> dict[str, str]:
    manifest = runtime.bundle.manifest
    settings = {i.name: i.default for i in manifest.plan.inputs if i.default is not None} | inputs
    return {
        "Software": "qexport",
        "model": manifest.model.name,
        "source": manifest.model.source,
        "scheme": manifest.scheme,
        "bundle": manifest.digest,
        "seed": str(seed),
        "classes": ",".join(map(str, labels)),
        "settings": ", ".join(f"{name}={value:g}" for name, value in settings.items()),
    }


def _check_destination(out: Path, separate: Path | None) -> None:
    """Refuse, before any work, a place that cannot be written."""
    check_file("--out", out, ".png")
    if separate is None:
        return
    if separate.exists() and not separate.is_dir():
        raise InputError(f"--separate {separate}: is a file; name a folder")
    check_folder("--separate", separate)
