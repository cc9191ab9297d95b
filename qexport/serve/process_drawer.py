"""A drawer in a process of its own: what crashes it, or kills it for want of memory, does not reach the front.

The process ends with its pipe, so none is left behind when the front is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.serve.drawers import Batch, LostError
from qexport.serve.failures import BrokenError
from qexport.serve.logs import event
from qexport.serve.worker import work
from qexport.targets.processor import usable_cores

END_S = 5.0
"""How long a process may take to notice that its pipe is closed; one in the middle of a batch is killed then."""


class ProcessDrawer:
    """One worker process at a time, started when needed."""

    def __init__(
        self, path: Path, provider: str = "auto", threads: int | None = None, devices: str | None = None
    ) -> None:
        """Remember what to run: the bundle at `path`, whose files must not change; nothing is started yet.

        Args:
            path: the bundle, hashes checked at every start.
            provider: where its graphs run.
            threads: CPU threads for one operator.
            devices: CUDA devices that the process sees, as in ``CUDA_VISIBLE_DEVICES``; None leaves it as it is.
        """
        self._arguments = (str(path), provider, threads, devices)
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Number of the running process."""
        process = self._process
        return process.pid if process is not None else None

    def start(self) -> None:
        """Start a process and wait until it has loaded the bundle."""
        self.stop()
        context = multiprocessing.get_context("spawn")  # a fork would copy the front's threads and sockets
        ours, theirs = context.Pipe()
        self._pipe = ours
        self._process = context.Process(target=work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()  # else its end would go unnoticed
        atexit.register(self.kill)  # comes before multiprocessing's own, which would wait for the batch
        kind, value = self._receive(None)
        if kind == "refused":
            self.stop()
            raise InputError(value)
        event("worker started", pid=self.pid, provider=value)

    def draw(self, batch: Batch, limit_s: float | None = None) -> np.ndarray:
        """As `Drawer.draw`; a process that takes longer than `limit_s` is killed."""
        if self._pipe is None or self._process is None:
            raise LostError("not started", begun=False)
        if not self._process.is_alive():
            raise self._lost("had ended", begun=False)
        try:
            self._pipe.send(batch)
        except OSError as error:
            raise self._lost("ended") from error
        kind, value = self._receive(limit_s)
        if kind == "failed":
            raise BrokenError(value)
        return value

    def kill(self) -> None:
        """As `Drawer.kill`."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process."""
        atexit.unregister(self.kill)
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.join(END_S)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process.close()
            self._process = None

    def _receive(self, limit_s: float | None) -> tuple[str, Any]:
        assert self._pipe is not None
        try:
            if not self._pipe.poll(limit_s):
                raise self._lost(f"did not answer within {limit_s:g} s")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._lost("ended") from error

    def _lost(self, how: str, begun: bool = True) -> LostError:
        """Clear away what is left of the process."""
        assert self._process is not None
        pid = self._process.pid
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.join()
        code = self._process.exitcode
        self.stop()
        return LostError(f"worker {pid} {how} (exit code {code})", begun)


def devices_of(worker: int, count: int, visible: str | None = None) -> str | None:
    """The CUDA device for worker number `worker`, in turns.

    Args:
        worker: counts from 0.
        count: devices that this process sees.
        visible: ``CUDA_VISIBLE_DEVICES`` of this process, which renames devices; None where it is not set.

    Returns:
        A value of that variable for the worker; None where there is nothing to choose from.
    """
    names = [name.strip() for name in visible.split(",")] if visible else list(map(str, range(count)))
    return names[worker % count] if 1 < count <= len(names) else None


def threads_of(workers: int, threads: int | None) -> int:
    """CPU threads for each worker: as asked for, or an even share of the cores."""
    return threads if threads is not None else max(1, usable_cores() // workers)
