"""Timing of functions that enqueue work on the device, and the torch functions that are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from report import Timing

WARM_UP, SAMPLES = 10, 15
SAMPLE_MS, MOST_RUNS = 10.0, 200  # a sample is as many runs as fill 10 ms, 200 at most, divided by their number


def measure(case: str, rows: int, how: str, cuda_graph: bool, run: Callable[[], object]) -> Timing:
    """Warm up, then time batches of runs between two device synchronisations."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()

    def batch_us(runs: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / runs * 1e6

    runs = int(min(MOST_RUNS, max(1.0, SAMPLE_MS * 1e3 / batch_us(3))))
    samples = [batch_us(runs) for _ in range(SAMPLES)]
    timing = Timing(case, rows, how, cuda_graph, statistics.median(samples), min(samples), max(samples), runs)
    print(f"{case} M={rows} {how}{' graph' if cuda_graph else ''}: {timing.median_us:.1f} us", flush=True)
    return timing


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Capture a torch function in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def scaled_mm(weights: list[torch.Tensor], rows: int, fast: bool) -> Callable[[], object]:
    """The GEMMs alone, on operands that are fp8 already: what the hardware gives without any quantisation kernel."""
    one = torch.ones((), device="cuda")
    w_fp8 = [w.to(torch.float8_e4m3fn) for w in weights]
    x_fp8 = {w.shape[1]: torch.randn(rows, w.shape[1], device="cuda").to(torch.float8_e4m3fn) for w in weights}

    def run() -> None:
        for w in w_fp8:
            torch._scaled_mm(
                x_fp8[w.shape[1]], w.t(), scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=fast
            )

    return run


def fp16_chain(weights: list[torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    """The chain in torch fp16."""

    def run() -> None:
        value = x
        for w in weights:
            value = torch.nn.functional.linear(value, w)

    return run
