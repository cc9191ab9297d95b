"""Running the service in this process: sockets, signals, and an end that loses no request.

On SIGTERM (or Ctrl-C) the service says on ``/readyz`` that it is not ready, goes on listening for `drain_delay_s`, then
refuses connections, finishes the requests it has (for `drain_s` at most) and ends with exit code 0. A second signal
ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.serve.api import create_app
from qexport.serve.drawers import LocalDrawer
from qexport.serve.engine import Engine
from qexport.serve.logs import event, to_stderr
from qexport.serve.metrics import Metrics
from qexport.serve.private_copy import load_private, name_of
from qexport.serve.settings import ServeSettings
from qexport.serve.workers import build_with_workers

BACKLOG = 512
KEEP_ALIVE_S = 15


def build(
    paths: Sequence[str | Path], settings: ServeSettings, provider: str = "auto", threads: int | None = None
) -> FastAPI:
    """The application for the bundles at `paths`, loaded into this process but not started.

    Raises:
        InputError: a bundle is missing or damaged, or cannot be served.
    """
    metrics = Metrics()
    engines = []
    for path in paths:
        event("loading", path=str(path))
        runtime = load_private(path, provider, threads)
        drawers = [LocalDrawer(runtime)]
        engines.append(Engine(name_of(path), runtime.bundle, drawers, runtime.provider, settings, metrics))
    return create_app(engines, settings, metrics)


def serve(
    paths: Sequence[str | Path],
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    provider: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    replicas: int | None = None,
) -> None:
    """Serve until a signal comes: in this process, with `workers` processes, or with `replicas` on a Ray cluster.

    Raises:
        InputError: as `build`; or the address cannot be listened on, or there is no cluster.
    """
    for path in paths:  # what is no bundle is said before the first line of the log
        Bundle.open(path, "size")
    to_stderr()
    listener = listen(host, port)
    with contextlib.closing(listener), contextlib.ExitStack() as stack:
        if replicas is not None:
            from qexport.serve.on_ray import build_on_ray

            app = stack.enter_context(build_on_ray(paths, settings, replicas, provider, threads))
        elif workers is not None:
            app = stack.enter_context(build_with_workers(paths, settings, workers, provider, threads))
        else:
            app = build(paths, settings, provider, threads)
        address = listener.getsockname()
        event("listening", host=address[0], port=address[1])
        run(app, listener, settings)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; bound before the bundles are loaded, so that a busy port is no surprise.

    Raises:
        InputError: the address is in use, or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host} port {port}: {reason.lower()}; choose another --port") from error
    return listener


def run(app: FastAPI, listener: socket.socket, settings: ServeSettings) -> None:
    """Run the application on a bound socket until a signal says otherwise."""
    asyncio.run(_server(app, settings).serve([listener]))


def run_until(app: FastAPI, listener: socket.socket, settings: ServeSettings, stop: threading.Event) -> None:
    """The same until `stop` is set, for programs that run the service in a thread of their own."""

    async def both() -> None:
        server = _server(app, settings)
        running = asyncio.create_task(server.serve([listener]))
        await asyncio.wait({running, asyncio.create_task(asyncio.to_thread(stop.wait))}, return_when="FIRST_COMPLETED")
        server.should_exit = True
        stop.set()
        await running

    asyncio.run(both())


def _server(app: FastAPI, settings: ServeSettings) -> _Server:
    config = uvicorn.Config(
        app,
        http=_timed_protocol(settings.read_timeout_s),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        # The engines are given drain_s; connections get a little longer, so that the answers go out.
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
    )
    return _Server(config, app, settings)


class _Server(uvicorn.Server):
    """uvicorn's server with our way of ending."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: ServeSettings) -> None:
        super().__init__(config)
        self._state = app.state
        self._settings = settings

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at the first signal and stop at the second; the base class would raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def handle(number: int, _: object) -> None:
            loop.call_soon_threadsafe(self._stop, signal.Signals(number).name)

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, name: str) -> None:
        if self._state.draining:
            self.force_exit = True
        self._state.draining = True
        event("draining", signal=name, delay_s=self._settings.drain_delay_s)
        asyncio.get_running_loop().call_later(self._settings.drain_delay_s, setattr, self, "should_exit", True)


def _timed_protocol(limit_s: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol that also hangs up on whoever sends no complete header within `limit_s`.

    uvicorn times idle connections between requests, but waits for a first one forever.
    """

    class Timed(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(limit_s, self._hang_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            between_requests = self.cycle is None or self.cycle.response_complete
            if not between_requests and self._timer is not None:
                self._timer.cancel()
                self._timer = None
            elif between_requests and self._timer is None:  # a part of the next header
                self._timer = self.loop.call_later(limit_s, self._hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _hang_up(self) -> None:
            if not self.transport.is_closing():
                self.transport.close()

    return Timed
