"""The application with processes that draw (`qexport serve --workers N`); the front loads no graph."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastapi import FastAPI

from qexport.runtime.session import choose_provider
from qexport.serve.api import create_app
from qexport.serve.engine import Engine
from qexport.serve.logs import event
from qexport.serve.metrics import Metrics
from qexport.serve.private_copy import keep, name_of, remove_leftovers
from qexport.serve.process_drawer import ProcessDrawer, devices_of, threads_of
from qexport.serve.settings import ServeSettings
from qexport.targets.ort_cuda import device_count


@contextlib.contextmanager
def build_with_workers(
    paths: Sequence[str | Path],
    settings: ServeSettings,
    workers: int,
    provider: str = "auto",
    threads: int | None = None,
) -> Iterator[FastAPI]:
    """The application with `workers` processes for each bundle, not started. Its copies of files last as the context.

    Raises:
        InputError: a bundle is missing or damaged, or cannot be served; or the provider cannot be used.
    """
    metrics = Metrics()
    chosen = choose_provider(provider)
    count = device_count() if chosen == "cuda" else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    share = threads_of(workers * len(paths), threads)
    for folder in remove_leftovers():
        event("removed", logging.WARNING, path=str(folder), why="left behind by a service that was killed")
    with contextlib.ExitStack() as stack:
        engines = []
        for path in paths:
            event("loading", path=str(path))
            bundle = stack.enter_context(keep(path))
            drawers = [
                ProcessDrawer(bundle.path, chosen, share, devices_of(worker, count, visible))
                for worker in range(workers)
            ]
            engines.append(Engine(name_of(path), bundle, drawers, chosen, settings, metrics))
        yield create_app(engines, settings, metrics)
