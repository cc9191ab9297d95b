"""`qexport serve`: answer requests for images over HTTP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from qexport.errors import InputError
from qexport_cli.options import ProviderOption

SERVE_PACKAGES = frozenset({"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"})
"""What `qexport[serve]` installs."""


def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE…", help="Folders that `qexport quantize` wrote; the first is default."),
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one and logs it.")] = 8000,
    buckets: Annotated[
        str, typer.Option(metavar="LIST", help="Batch sizes; one alone makes every answer the same to the byte.")
    ] = "2,4,8",
    queue: Annotated[int, typer.Option(metavar="N", help="Images that may wait, per bundle; then 429.")] = 256,
    max_images: Annotated[int, typer.Option(metavar="N", help="Most images of one request.")] = 64,
    deadline: Annotated[float, typer.Option(metavar="S", help="Seconds until a request is answered 504.")] = 60,
    linger_ms: Annotated[float, typer.Option(metavar="MS", help="How long a batch that is not full waits.")] = 10,
    drain_delay: Annotated[
        float, typer.Option(metavar="S", help="Seconds to go on listening, not ready, after SIGTERM.")
    ] = 0,
    drain: Annotated[float, typer.Option(metavar="S", help="Seconds that running requests get to finish.")] = 60,
    provider: ProviderOption = "auto",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="CPU threads; one per core if left out, with --workers their share."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Draw in N processes for each bundle; one that ends is started again."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Draw in replicas on a Ray cluster: RAY_ADDRESS, or this machine.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --ray: replicas of each bundle; 1 if left out.")
    ] = None,
) -> None:
    """Serve images over HTTP, with a page to try it.

    POST /v1/images draws, the page is at /, the interface described at /docs. Requests that come together are drawn
    together. Give several bundles to compare them side by side. The log goes to stderr, one JSON object a line.
    """
    if ray and workers is not None:
        raise InputError("--workers and --ray exclude each other; with --ray give --replicas")
    if replicas is not None and not ray:
        raise InputError("--replicas needs --ray; processes on this machine are --workers")
    if ray and find_spec("ray") is None:
        raise InputError("--ray needs qexport[ray]: pip install 'qexport[ray]'")
    try:
        from qexport.serve import ServeSettings
        from qexport.serve.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in SERVE_PACKAGES:
            raise
        missing = f"({error.name} is not installed)"
        raise InputError(f"this needs qexport[serve]: pip install 'qexport[serve]' {missing}") from error

    settings = ServeSettings(
        buckets=_sizes(buckets),
        queue_images=queue,
        max_images=min(max_images, queue),
        deadline_s=deadline,
        linger_ms=linger_ms,
        drain_delay_s=drain_delay,
        drain_s=drain,
    )
    run(
        bundles,
        settings,
        host=host,
        port=port,
        provider=provider,
        threads=threads,
        workers=workers,
        replicas=(replicas or 1) if ray else None,
    )


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise InputError(f"--buckets {text!r}: give batch sizes, as in 2,4,8")
    return tuple(map(int, parts))
