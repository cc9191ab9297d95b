"""What the device can do at most, measured in the same run: a memory stream and a matrix product, by ONNX Runtime.

    bytes per second    c = a + b over `STREAM_BYTES` each, far beyond any cache: two reads and a write
    flops per second    one product of `GEMM_SIZE` cubed, in the type that the provider is good at

Both with the same number of threads and in the same kind of session as the contenders. A form that computes in integers
may exceed the second: it is the ceiling of floating point.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import onnxruntime

from qexport.bench.forms import FORMS, layer_model
from qexport.bench.tiny_graphs import one_operator, session_of
from qexport.errors import BundleError

STREAM_BYTES = 1 << 26
"""64 MiB an array; last-level caches of servers hold about as much as one of the three."""

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
REPEATS = 7
"""The best counts: a ceiling is what was reached once."""


@dataclass(frozen=True)
class Ceilings:
    """Of one device: bytes and floating-point operations a second, and the type of the latter."""

    bytes_per_s: float
    flops_per_s: float
    dtype: str

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each figure of two measurements."""
        bytes_per_s = max(self.bytes_per_s, other.bytes_per_s)
        return Ceilings(bytes_per_s, max(self.flops_per_s, other.flops_per_s), self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_ceilings(provider: str, threads: int | None = None) -> Ceilings:
    """Measure, in a process of its own.

    Raises:
        BundleError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=_child, args=(end, provider, threads), daemon=True)
    process.start()
    end.close()
    try:
        answer = pipe.recv()
    except EOFError:
        answer = "its process ended without an answer"
    process.join()
    if isinstance(answer, str):
        raise BundleError(f"the device's ceilings could not be measured: {answer}")
    return Ceilings(*answer)


def _child(pipe: Connection, provider: str, threads: int | None) -> None:
    try:
        dtype = "float32" if provider == "cpu" else "float16"
        where = _Where(provider, dtype, threads)
        count = STREAM_BYTES // np.dtype(dtype).itemsize
        stream = _seconds(one_operator("Add", [(count,), (count,)], dtype), {"a": (count,), "b": (count,)}, "c", where)
        size = GEMM_SIZE["cpu" if provider == "cpu" else "cuda"]
        layer = layer_model(FORMS[dtype], size, size, dtype)  # a constant weight, which is packed once
        gemm = _seconds(layer, {"x": (size, size)}, "y", where)
        pipe.send((3 * STREAM_BYTES / stream, 2.0 * size**3 / gemm, dtype))
    except Exception as error:  # a figure beside the measurement must not end it
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class _Where:
    provider: str
    dtype: str
    threads: int | None


def _seconds(model: bytes, shapes: Mapping[str, tuple[int, ...]], output: str, where: _Where) -> float:
    """The least seconds of a run of `model` on inputs that are on the device."""
    session, device = session_of(model, where.provider, where.threads)
    rng = np.random.default_rng(0)
    binding = session.io_binding()
    kept = []  # a binding does not keep its values alive
    for name, shape in shapes.items():
        array = rng.random(shape, np.float32).astype(where.dtype)
        kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
        binding.bind_ortvalue_input(name, kept[-1])
    binding.bind_output(output, device, 0)
    return least_seconds(lambda: session.run_with_iobinding(binding), REPEATS)


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """The least of so many runs after one that does not count."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
