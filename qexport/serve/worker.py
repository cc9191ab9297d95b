"""The process behind a `ProcessDrawer`: loads the bundle, then draws what comes through the pipe until it closes.

Messages out: ``("ready", provider)`` or ``("refused", why)`` once, then for each batch ``("images", array)`` or
``("failed", why)``. Little is imported before `devices` is set, which CUDA reads when it is first loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing.connection import Connection


def work(pipe: Connection, path: str, provider: str, threads: int | None, devices: str | None) -> None:
    """Serve one pipe. The front decides when to end, so signals that a terminal sends to all its processes are none."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    with contextlib.suppress(EOFError, OSError):  # the front closed the pipe, or has died
        _work(pipe, path, provider, threads)


def _work(pipe: Connection, path: str, provider: str, threads: int | None) -> None:
    from qexport.errors import InputError
    from qexport.runtime import load
    from qexport.serve.drawers import LocalDrawer
    from qexport.serve.failures import BrokenError
    from qexport.serve.logs import to_stderr

    to_stderr()
    try:
        runtime = load(path, provider=provider, threads=threads)  # checks every hash
    except InputError as error:
        pipe.send(("refused", str(error)))
        return
    drawer = LocalDrawer(runtime)
    pipe.send(("ready", runtime.provider))
    while True:
        batch = pipe.recv()
        try:
            reply = ("images", drawer.draw(batch))
        except BrokenError as error:
            reply = ("failed", str(error))
        pipe.send(reply)
