"""Drawers on a Ray cluster: replicas of a Ray Serve deployment, over GPUs and machines. Needs qexport[ray].

The front stays what it is: it takes requests, makes batches, and hands each to the deployment. Ray Serve picks a
replica, watches over all of them, and replaces the ones that end. No HTTP server of Ray's is started.
"""

# pyright: reportMissingImports=false
# Ray is an extra that the checks run without.

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.runtime.inputs import label_input
from qexport.serve.drawers import Batch, LocalDrawer, LostError
from qexport.serve.failures import BrokenError
from qexport.serve.logs import to_stderr
from qexport.serve.private_copy import load_private

HEALTH_EVERY_S = 2.0
"""How often Ray Serve asks a replica whether it lives (10 s by default): most of the time until it is replaced."""

DRAIN_S = 5.0
"""How long a replica may go on after it was told to end; the front has finished with it by then."""

ADDRESS = "RAY_ADDRESS"
"""Ray's own variable."""


class Replica:
    """What runs on the cluster, one a process."""

    def __init__(self, path: str, digest: str, provider: str, threads: int, buckets: tuple[int, ...]) -> None:
        """Load the bundle at `path` of this machine and draw one batch of each bucket.

        Raises:
            InputError: the bundle there is missing, damaged or another one, or cannot be run here.
        """
        to_stderr()
        runtime = load_private(path, provider, threads)
        if runtime.bundle.manifest.digest != digest:
            raise InputError(f"{path} on {platform.node()} is another bundle than the one served; copy it there again")
        self._drawer = LocalDrawer(runtime)
        port = label_input(runtime.bundle.plan)
        assert port is not None
        for size in buckets:
            self._drawer.draw(Batch({port.name: np.zeros(size, port.dtype)}, [(0, i) for i in range(size)]))

    def draw(self, batch: Batch) -> tuple[str, Any]:
        """``("images", array)`` or ``("failed", why)``, as the worker's messages."""
        try:
            return "images", self._drawer.draw(batch)
        except BrokenError as error:
            return "failed", str(error)


class RayDrawer:
    """One batch at a time to whichever replica is free. As many of these as replicas keep all of them busy."""

    def __init__(self, handle: Any) -> None:
        """Take the handle of a deployment of `Replica`."""
        self._handle = handle

    def start(self) -> None:
        """Nothing to do: Ray Serve starts replicas."""

    def draw(self, batch: Batch, limit_s: float | None = None) -> np.ndarray:
        """As `Drawer.draw`; a batch that takes longer than `limit_s` is given up."""
        kind, value = _result(self._handle.draw.remote(batch), limit_s)
        if kind == "failed":
            raise BrokenError(value)
        return value

    def kill(self) -> None:
        """Nothing: replicas end with the deployment."""

    def stop(self) -> None:
        """Nothing: replicas end with the deployment."""


@contextlib.contextmanager
def deployed(
    path: Path, name: str, replicas: int, provider: str, threads: int, buckets: tuple[int, ...]
) -> Iterator[tuple[Bundle, list[RayDrawer], str]]:
    """Replicas of the bundle at `path`, for as long as the context: the bundle, what draws it, and the provider.

    The path must lead to the same bundle on every machine of the cluster.

    Raises:
        InputError: no bundle there, or no replica could be started.
    """
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    bundle = Bundle.open(path)
    chosen = ("cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu") if provider == "auto" else provider
    _check_room(replicas, "GPU", int(chosen == "cuda"))
    deployment = serve.deployment(
        Replica,
        name="draw",
        num_replicas=replicas,
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": threads, "num_gpus": int(chosen == "cuda")},
        health_check_period_s=HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=DRAIN_S,
        logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
    )
    where = str(bundle.path.resolve())
    application = deployment.bind(where, bundle.manifest.digest, chosen, threads, buckets)
    # The same name after a restart: what a front that was killed has left on the cluster is replaced.
    app = f"qexport-{platform.node()}-{name}"
    try:
        try:
            handle = serve.run(application, name=app, route_prefix=None)
        except RuntimeError as error:
            raise InputError(f"Ray Serve could not start {name}: {_reason(error)}") from error
        yield bundle, [RayDrawer(handle) for _ in range(replicas)], chosen
    finally:
        if ADDRESS in os.environ:  # a cluster of ours ends as a whole
            with contextlib.suppress(Exception):  # the cluster may be gone already
                serve.delete(app)


@contextlib.contextmanager
def cluster(replicas: int, threads: int) -> Iterator[None]:
    """The cluster at ``RAY_ADDRESS`` (``auto``: the one that runs here), or else a new one on this machine.

    Raises:
        InputError: the cluster cannot be reached, or a new one on this machine has too few cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        address = os.environ.get(ADDRESS, "local")
        ray.init(
            address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, namespace="qexport"
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster: {_reason(error)}") from error
    try:
        _check_room(replicas, "CPU", threads)
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)
        yield
    finally:
        ray.shutdown()


def _check_room(replicas: int, kind: str, each: int) -> None:
    """Refuse what would wait for ever on a cluster of one machine; a larger one may still grow.

    Raises:
        InputError: the machine has fewer cores or GPUs than asked for.
    """
    import ray

    wanted, there = replicas * each, int(ray.cluster_resources().get(kind, 0))
    if len(ray.nodes()) == 1 and wanted > there:
        names = {"CPU": "cores", "GPU": "GPUs"}
        raise InputError(f"{replicas} replicas need {wanted} {names[kind]}, there are {there}; choose fewer --replicas")


def _result(response: Any, limit_s: float | None) -> Any:
    """What a replica answered.

    Raises:
        LostError: it ended, or took longer than `limit_s`.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        return response.result(timeout_s=limit_s)
    except TimeoutError as error:
        response.cancel()
        raise LostError(f"a replica did not answer within {limit_s:g} s") from error
    except RayTaskError:  # a fault of ours in the replica's code: no other replica would do better
        raise
    except (RayError, RayServeException) as error:
        raise LostError(f"a replica ended: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line of a message that ends with a traceback from another machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "Error: " in line]
    return (ours or lines or [type(error).__name__])[-1]
