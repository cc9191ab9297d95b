"""The application with replicas on a Ray cluster (`qexport serve --ray`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastapi import FastAPI

from qexport.serve.api import create_app
from qexport.serve.engine import Engine
from qexport.serve.logs import event
from qexport.serve.metrics import Metrics
from qexport.serve.private_copy import name_of
from qexport.serve.ray_drawer import cluster, deployed
from qexport.serve.settings import ServeSettings


@contextlib.contextmanager
def build_on_ray(
    paths: Sequence[str | Path],
    settings: ServeSettings,
    replicas: int,
    provider: str = "auto",
    threads: int | None = None,
) -> Iterator[FastAPI]:
    """The application with `replicas` replicas for each bundle, which last as long as the context.

    Raises:
        InputError: a bundle is missing or damaged, or cannot be served; or there is no cluster, or no room on it.
    """
    metrics = Metrics()
    cores = 1 if threads is None else threads  # machines of a cluster may have different numbers of them
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster(replicas * len(paths), cores))
        engines = []
        for path in paths:
            event("loading", path=str(path), replicas=replicas)
            one = deployed(Path(path), name_of(path), replicas, provider, cores, settings.buckets)
            bundle, drawers, chosen = stack.enter_context(one)
            engines.append(Engine(name_of(path), bundle, drawers, chosen, settings, metrics))
        yield create_app(engines, settings, metrics)
