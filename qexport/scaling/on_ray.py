"""A sweep over several machines, by Ray (the optional extra ``qexport[ray]``).

Only this process opens the store: workers measure and hand back what they found, and claims are this process's. A run
whose worker is lost is reported, and made by the next sweep. Files (images, checkpoints) must lie at the same path on
every machine, and the same qexport must be installed; the key does not tell, so the environment of each row is that of
the worker.

``RAY_ADDRESS`` names the cluster; without it Ray starts one on this machine.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qexport.errors import InputError, QexportError
from qexport.scaling.grid import Run
from qexport.scaling.store import Measured, Store
from qexport.scaling.sweep import Outcome, Progress, Task


def sweep_on_ray(task: Task, progress: Progress | None = None) -> Outcome:
    """As `qexport.scaling.sweep.sweep`; every run takes `task.threads` processors of a worker.

    Raises:
        InputError: Ray is not installed, or no machine of the cluster has so many processors.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise InputError("--ray needs qexport[ray]: pip install 'qexport[ray]'") from None
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS", "local")  # never a cluster that happens to run here
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    try:
        greatest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        if greatest < task.threads:
            raise InputError(f"--ray: a run takes {task.threads} processors, no machine has more than {greatest}")
        return _sweep(ray, task, int(ray.cluster_resources()["CPU"]) // task.threads, progress)
    finally:
        if started:
            ray.shutdown()


def _sweep(ray: Any, task: Task, at_once: int, progress: Progress | None) -> Outcome:
    remote = ray.remote(num_cpus=task.threads, max_retries=0)(_measured)
    sent = replace(task, runs=())
    failed: dict[str, str] = {}
    with Store(task.store) as store:
        before = store.keys()
        waiting = [(key, run) for key, run in task.runs if key not in before]
        flying: dict[Any, tuple[str, Run]] = {}
        try:
            while waiting or flying:
                while waiting and len(flying) < at_once:
                    key, run = waiting.pop(0)
                    if store.claim(key):
                        flying[remote.remote(sent, key, run)] = key, run
                if not flying:
                    break
                (done,), _ = ray.wait(list(flying), num_returns=1)
                key, run = flying.pop(done)
                try:
                    found = ray.get(done)
                except ray.exceptions.RayError as error:
                    found = f"the worker was lost ({type(error).__name__})"
                if isinstance(found, str):
                    failed[str(run)] = found
                    store.release(key)
                else:
                    measured, environment, wall_s = found
                    store.record(key, run, measured, environment=environment, version=version("qexport"), wall_s=wall_s)
                if progress is not None:
                    progress("runs", len(task.runs) - len(waiting) - len(flying), len(task.runs))
        finally:
            for key, _ in flying.values():
                store.release(key)
        after = store.keys()
    wanted = {key for key, _ in task.runs}
    missing = [str(run) for key, run in task.runs if key not in after and str(run) not in failed]
    return Outcome(len((wanted & after) - before), len(wanted & before), failed, missing)


def _measured(task: Task, key: str, run: Run) -> tuple[Measured, Mapping[str, Any], float] | str:
    """On a worker: what the run gave, the worker's environment and seconds; or what is wrong with it."""
    environment = task.prepare(task.threads)
    if getattr(task.files, "images", None) and not Path(task.files.images).exists():
        return f"{task.files.images}: not on this machine; every worker must see it at the same path"
    start_s = time.perf_counter()
    try:
        measured = task.measure(run, key, task.how, task.files)
    except QexportError as error:
        return str(error)
    return measured, environment, round(time.perf_counter() - start_s, 2)
