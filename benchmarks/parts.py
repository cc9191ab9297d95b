"""A part of a benchmark in a process of its own: told as it goes, and ended when its time is up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LONGEST_TEXT = 300


def in_a_process(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    seconds: float,
    heard: Callable[[int, dict[str, Any]], None],
) -> str | None:
    """Call ``function(tell, *arguments)`` in a new process; what it tells is passed to `heard` at once.

    Returns:
        None if it came to its end, else why not, in one line. After `seconds` it is killed with all that it started.
    """
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=_work, args=(end, function, arguments))
    process.start()
    end.close()
    deadline = time.monotonic() + seconds
    try:
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            kind, *told = pipe.recv()
            if kind == "found":
                heard(*told)
            elif kind == "failed":
                return told[0]
            else:
                process.join(max(0.0, deadline - time.monotonic()))
                return None
    except EOFError:
        process.join(1)
        return f"its process ended without an answer (exit code {process.exitcode})"
    finally:
        _end(process)
        pipe.close()
    return f"timed out after {seconds:.0f} s"


def _end(process: Any) -> None:
    """Kill the process and all in its group (torch.compile starts workers)."""
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill()
    process.join()


def _work(pipe: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    try:
        function(lambda *told: pipe.send(("found", *told)), *arguments)
        pipe.send(("done",))
    except Exception as error:  # the table says so and goes on
        text = " ".join(str(error).split()) or "no words"
        pipe.send(("failed", f"{type(error).__name__}: {text[:LONGEST_TEXT]}"))
