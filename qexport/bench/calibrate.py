"""`calibrate`: measure every form of a layer on the device at hand, and make its table for `lower --optimize`.

For each shape [K, N] and number of rows, all forms take turns in one process (A B C A B C …), as contenders of `bench`
do; a form's time in a round is the median of its turns. Rounds go over all rows one after another, so that drift of the
machine shows between them: the median of a form's rounds counts, the fastest and the slowest bound what noise can do.
Rows go from one token to a large batch. Short calls are repeated within a turn, so that a turn is longer than the
clock's grain and than what a thread takes to wake up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

from qexport.bench.forms import Form, forms_of, layer_model
from qexport.bench.tiny_graphs import session_of
from qexport.errors import InputError, QexportError
from qexport.runtime.session import choose_provider, first_line
from qexport.targets.device_table import DeviceTable, Timing, cached_path
from qexport.targets.devices import device_names

ROWS = {"cpu": (1, 4, 16, 64, 256, 1024), "cuda": (1, 4, 16, 64, 256, 1024, 4096, 16384)}
"""From one token to a batch of images that the provider is used for."""
SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024))
"""(K, N): attention's projection and the two of a feed-forward layer, of a model as wide as var-d16."""

DIFFERENT_ROWS = 256
"""More are repeated: drawing tens of millions of numbers for each form takes longer than timing it."""

ROUNDS = 3
"""Where two forms take the same time, all rounds of one are faster than all rounds of the other in one case of twenty:
3! · 3! / 6!. `lower --optimize` takes a gain for real only then."""
TURNS = 5
SHORTEST_TURN_S = 2e-3

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """The table, where it lies by default, and the forms that the device refused."""

    table: DeviceTable
    path: Path
    failed: dict[str, str] = field(default_factory=dict)


def calibrate(
    provider: str = "auto",
    threads: int | None = None,
    rows: Sequence[int] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    turns: int = TURNS,
    progress: Progress | None = None,
) -> Calibrated:
    """Measure; nothing is written.

    Args:
        provider: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None leaves it to ONNX Runtime.
        rows: numbers of rows; None takes the provider's `ROWS`.
        shapes: (inputs, outputs) of layers.
        turns: how often each form is timed in each of `ROUNDS` rounds, after once that does not count.
        progress: told how far it is.

    Raises:
        InputError: the provider cannot be used, or refused every form.
    """
    chosen = choose_provider(provider)
    rows = rows or ROWS[chosen]
    tell = progress or (lambda stage, done, total: None)
    device = device_names(chosen)[0]
    timings: list[Timing] = []
    failed: dict[str, str] = {}
    for number, (inputs, outputs) in enumerate(shapes):
        tell("calibrate", number, len(shapes))
        layers = {}
        for name, form in forms_of(chosen).items():
            try:
                layers[name] = _Layer(form, inputs, outputs, chosen, threads)
            except QexportError as error:
                failed[name] = first_line(error)
        rounds = [{count: _in_turns(layers, count, turns, failed) for count in rows} for _ in range(ROUNDS)]
        for count in rows:
            for name in layers:
                medians = [each[count][name] for each in rounds if name in each[count]]
                if len(medians) == ROUNDS:
                    timings.append(timing(name, count, inputs, outputs, medians))
    tell("calibrate", len(shapes), len(shapes))
    if not timings:
        raise InputError(f"{chosen} refused every form ({'; '.join(failed.values())})")
    source = (
        f"qexport bench --calibrate-device: onnxruntime {onnxruntime.__version__}, serve options, "
        f"{threads or 'default'} threads, median of {ROUNDS} rounds of {turns} turns"
    )
    return Calibrated(DeviceTable(device, chosen, source, tuple(timings)), cached_path(device, chosen), failed)


def timing(form: str, rows: int, inputs: int, outputs: int, medians_us: Sequence[float]) -> Timing:
    """The line of a table, from the medians of all rounds (microseconds)."""
    least, us, greatest = (round(f(medians_us), 2) for f in (min, statistics.median, max))
    return Timing(form, rows, inputs, outputs, us, least, greatest)


class _Layer:
    """A session of one form, with its input bound for so many rows."""

    def __init__(self, form: Form, inputs: int, outputs: int, provider: str, threads: int | None) -> None:
        self.inputs = inputs
        self.dtype = "float32" if provider == "cpu" else "float16"
        model = layer_model(form, inputs, outputs, self.dtype)
        self.session, self.device = session_of(model, provider, threads, form.traits)

    def bound(self, rows: int) -> Callable[[], None]:
        """A function that runs it."""
        some = np.random.default_rng(0).normal(size=(min(rows, DIFFERENT_ROWS), self.inputs)).astype(self.dtype)
        x = np.resize(some, (rows, self.inputs))
        value = onnxruntime.OrtValue.ortvalue_from_numpy(x, self.device, 0)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("x", value)
        binding.bind_output("y", self.device, 0)

        def run(kept: object = value) -> None:
            self.session.run_with_iobinding(binding)

        return run


def _in_turns(layers: dict[str, _Layer], rows: int, turns: int, failed: dict[str, str]) -> dict[str, float]:
    """Microseconds of each form in one round, median over turns."""
    runs: dict[str, tuple[Callable[[], None], int]] = {}
    for name, layer in layers.items():
        run = layer.bound(rows)
        try:
            run()  # warm-up; some kernels are claimed and then throw
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            failed[name] = first_line(error)
            continue
        runs[name] = (run, max(1, round(SHORTEST_TURN_S / _seconds(run, 1))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (run, times) in runs.items():
            found[name].append(_seconds(run, times) * 1e6)
    return {name: statistics.median(us) for name, us in found.items()}


def _seconds(run: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times
