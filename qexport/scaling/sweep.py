"""Carrying out a grid: what the store lacks is measured and written, one run after another or in several processes.

Every process walks the same list and claims what nobody holds, so any number of sweeps on one store share the work,
and one that is killed leaves the run in flight to whoever comes next.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qexport.errors import InputError, QexportError
from qexport.scaling.grid import Measurement, Run, key_of
from qexport.scaling.store import Measured, Store
from qexport.targets.processor import usable_cores

Measure = Callable[..., Measured]
"""`(run, key, how, files)` → what it gave; a function of a module, since other processes must find it."""

Progress = Callable[[str, int, int], None]
"""Called with (the run at hand, runs done, runs in all)."""

POLL_S = 0.5
"""How often the first process looks what the others have done."""


def torch_environment(threads: int) -> Mapping[str, Any]:
    """Give torch so many threads, and describe the machine."""
    import torch

    from qexport.verify.environment import describe_environment

    torch.set_num_threads(threads)
    return describe_environment("cpu")


@dataclass(frozen=True)
class Task:
    """What every process is given: runs with their keys, how and with which files `measure` is to be called, the path
    of the store, threads of each process, and what prepares a process and describes it.
    """

    runs: tuple[tuple[str, Run], ...]
    how: Measurement
    files: Any
    store: str
    measure: Measure
    threads: int
    prepare: Callable[[int], Mapping[str, Any]] = torch_environment


@dataclass(frozen=True)
class Outcome:
    """What a sweep did: how many runs it made and found, messages of those that failed, and those that others hold."""

    made: int
    found: int
    failed: Mapping[str, str]
    elsewhere: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether the store now has every run."""
        return not self.failed and not self.elsewhere


def keyed(
    runs: Sequence[Run], digests: Mapping[str, Mapping[str, str]], how: Measurement
) -> tuple[tuple[str, Run], ...]:
    """Each run with its key; `digests` are those of each model's files."""
    own = version("qexport")
    return tuple((key_of(run, digests[run.model], how, own), run) for run in runs)


def threads_for(jobs: int) -> int:
    """Threads of torch in each of `jobs` processes: OMP_NUM_THREADS where it is set, else a share of the cores.

    More threads than cores, those of other processes counted, wait for one another: two processes of two threads on
    two cores take several times as long as two of one.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # OpenMP knows lists, of which the first counts
    return int(asked) if asked.isdecimal() and int(asked) else max(1, usable_cores() // jobs)


def sweep(task: Task, jobs: int = 1, progress: Progress | None = None) -> Outcome:
    """Measure what the store lacks of `task.runs`.

    A run that fails is reported and does not stop the others.

    Raises:
        InputError: fewer than one process.
    """
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: at least 1 process is needed")
    with Store(task.store) as store:
        before = store.keys()
    wanted = {key for key, _ in task.runs}
    found = len(wanted & before)
    if found == len(wanted):
        return Outcome(0, found, {}, ())
    failed = work(task, None, progress) if jobs == 1 else _in_processes(task, jobs, progress)
    with Store(task.store) as store:
        after = store.keys()
    names = {key: str(run) for key, run in task.runs}
    missing = [names[key] for key in names if key not in after and names[key] not in failed]
    return Outcome(len(wanted & after) - found, found, failed, missing)


def work(task: Task, parent: int | None, progress: Progress | None = None) -> dict[str, str]:
    """Walk the list once in this process; returns the messages of runs that failed.

    `parent` is the process that started this one; when it is gone, this one stops after the run at hand.
    """
    environment = task.prepare(task.threads)
    failed: dict[str, str] = {}
    with Store(task.store) as store:
        for number, (key, run) in enumerate(task.runs):
            if parent is not None and os.getppid() != parent:
                break
            if progress is not None:
                progress(str(run), number, len(task.runs))
            if not store.claim(key):
                continue
            start_s = time.perf_counter()
            try:
                measured = task.measure(run, key, task.how, task.files)
            except QexportError as error:
                failed[str(run)] = str(error)
                store.release(key)
                continue
            except BaseException:
                store.release(key)
                raise
            store.record(
                key, run, measured, environment=environment, version=version("qexport"),
                wall_s=round(time.perf_counter() - start_s, 2),
            )  # fmt: skip
    return failed


def _in_processes(task: Task, jobs: int, progress: Progress | None) -> dict[str, str]:
    """`work` in several processes; torch does not survive a fork, so they are spawned."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.SimpleQueue()
    processes = [context.Process(target=_child, args=(task, os.getpid(), messages)) for _ in range(jobs)]
    failed: dict[str, str] = {}
    try:
        for process in processes:
            process.start()
        wanted = {key for key, _ in task.runs}
        with Store(task.store) as store:
            while any(process.is_alive() for process in processes):
                while not messages.empty():
                    failed |= messages.get()
                if progress is not None:
                    progress("runs", len(wanted & store.keys()), len(wanted))
                time.sleep(POLL_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
    while not messages.empty():
        failed |= messages.get()
    return failed


def _child(task: Task, parent: int, messages: Any) -> None:
    failed = work(task, parent)
    if failed:
        messages.put(failed)


def digests_of(models: Sequence[str], files: Any) -> dict[str, dict[str, str]]:
    """Digests of each model's checkpoint files, by role. The models are loaded and dropped again.

    Raises:
        InputError: a model cannot be loaded; said before the long part.
    """
    from qexport.scaling.measure import load

    return {model: dict(load(model, files).checkpoint_sha256) for model in models}


def digest_of(option: str, path: str | Path) -> str:
    """SHA-256 of the file that an option names, or of the names and contents of a folder's files.

    Raises:
        InputError: there is nothing there.
    """
    import hashlib

    where = Path(path)
    if not where.exists():
        raise InputError(f"{option} {where}: no such file or folder")
    digest = hashlib.sha256()
    files = sorted(p for p in where.rglob("*") if p.is_file()) if where.is_dir() else [where]
    for file in files:
        if where.is_dir():
            digest.update(file.relative_to(where).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
