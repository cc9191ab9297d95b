"""`load` a bundle and `generate` images from it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnxruntime import OrtValue

from qexport.bundle import Bundle, Manifest
from qexport.errors import InputError
from qexport.runtime.captured import captured_sessions, static_backend
from qexport.runtime.inputs import check_inputs, is_per_image, label_input, to_arrays
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.player import Player
from qexport.runtime.session import choose_provider, make_session
from qexport.scheme import PerToken
from qexport.targets import QuantTraits, session_config

CONVOLUTION_DIMENSIONS = 4
"""Of a weight (outputs, inputs, height, width)."""

Progress = Callable[[int, int], None]
"""Called with (calls of a graph done, calls in all)."""


class Runtime:
    """A bundle with its sessions. Make one with `load`; it may be shared by threads.

    `uncaptured` names the graphs that ONNX Runtime would not take as CUDA graphs, though they were asked for.
    """

    def __init__(
        self, bundle: Bundle, player: Player[OrtValue], provider: str, uncaptured: Sequence[str] = (),
        one_at_a_time: bool = False,
    ) -> None:  # fmt: skip
        """Use `load`."""
        self.bundle = bundle
        self.player = player
        self.provider = provider
        self.uncaptured = tuple(uncaptured)
        self._turn = threading.Lock() if one_at_a_time else contextlib.nullcontext()

    def generate(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 16,
        schedule: str | None = None,
        progress: Progress | None = None,
        **inputs: Any,
    ) -> np.ndarray:
        """Generate one image for each label.

        Args:
            labels: class of each image, (n,) whole numbers.
            seed: image i depends on (seed, first_index + i), its label and `inputs`, not on how images are batched
                (beyond rounding, where kernels differ by batch).
            first_index: number of the first image.
            batch: most images at a time; bounds the memory.
            schedule: one of ``bundle.plan.schedules`` (``"ddim-25"``); None takes the plan's default.
            progress: told how far it is after every call of a graph.
            inputs: other inputs of the plan (``cfg``, ``top_k`` …): one number, or one an image where it is per image.

        Returns:
            Images (n, 3, H, W) float32 in [0, 1].

        Raises:
            InputError: a label, an input or the schedule is not valid, or the memory does not suffice.
        """
        batches = self.batches(
            labels,
            seed=seed,
            first_index=first_index,
            batch=batch,
            schedule=schedule,
            progress=progress,
            **inputs,
        )
        return np.concatenate(list(batches))

    def batches(
        self,
        labels: Sequence[int] | np.ndarray,
        *,
        seed: int = 0,
        first_index: int = 0,
        batch: int = 16,
        schedule: str | None = None,
        progress: Progress | None = None,
        **inputs: Any,
    ) -> Iterator[np.ndarray]:
        """The same as `generate`, one batch of at most `batch` images after another."""
        player = self.player if schedule is None else self.player.with_schedule(schedule)
        plan = player.plan
        if batch < 1:
            raise InputError(f"batch is {batch}; at least 1 is needed")
        port = label_input(plan)
        if port is None:
            raise InputError("this bundle takes no class labels by themselves; use `player.play` with its inputs")
        values = to_arrays(plan, {**inputs, port.name: labels})
        if port.name not in values or values[port.name].ndim != 1 or values[port.name].size == 0:
            raise InputError("labels must be a list with the class of each image, and not empty")
        total = values[port.name].size
        check_inputs(plan, values, {**plan.dims, "batch": total})  # before any work, and for all images
        split = {i.name for i in plan.inputs if is_per_image(i) and i.name in values and values[i.name].ndim}
        return self._play(player, values, split, total, seed, first_index, batch, progress)

    def _play(
        self,
        player: Player[OrtValue],
        values: Mapping[str, np.ndarray],
        split: set[str],
        total: int,
        seed: int,
        first_index: int,
        batch: int,
        progress: Progress | None,
    ) -> Iterator[np.ndarray]:
        calls = player.calls * -(-total // batch)
        done = count(1)

        def called(_: str) -> None:
            if progress is not None:
                progress(next(done), calls)

        for start in range(0, total, batch):
            stop = min(start + batch, total)
            part = {name: value[start:stop] if name in split else value for name, value in values.items()}
            with self._turn:
                images = player.play(part, seed=seed, first_index=first_index + start, called=called)
            yield images.astype(np.float32, copy=False)


def load(
    path: str | Path,
    provider: Literal["auto", "cpu", "cuda"] | str = "auto",
    options: Literal["serve", "exact"] | str = "serve",
    threads: int | None = None,
    target: str | None = None,
    check: Literal["full", "size"] = "full",
    cuda_graphs: bool = False,
) -> Runtime:
    """Open a bundle and make a session for each of its graphs.

    Args:
        path: the bundle.
        provider: where to run; ``"auto"`` takes CUDA where there is a GPU.
        options: ``"serve"`` for speed, ``"exact"`` for parity; `qexport.targets` says what they change.
        threads: CPU threads for one operator; None leaves it to ONNX Runtime.
        target: run the graphs that were lowered to it instead of the portable ones.
        check: ``"full"`` verifies every hash, ``"size"`` only sizes.
        cuda_graphs: on CUDA, record what a graph does once for every shape and play it back, which takes the launching
            of kernels off the processor. The first images of a batch size are slower; threads take turns; graphs that
            cannot be recorded run as ever (`Runtime.uncaptured`).

    Raises:
        BundleError: the bundle is damaged, or ONNX Runtime cannot load it.
        InputError: no bundle, no such provider, the provider cannot be used here, or CUDA graphs without CUDA.
    """
    chosen = choose_provider(provider)
    if cuda_graphs and chosen != "cuda":
        raise InputError(f"CUDA graphs need CUDA, and the provider is {chosen}; leave them out")
    bundle = Bundle.open(path, check)
    files = bundle.graph_files(target)
    configs = {name: session_config(chosen, options, quant_traits(bundle.manifest, name)) for name in files}
    device = next(iter(configs.values())).device
    if cuda_graphs:
        sessions, uncaptured = captured_sessions(files, bundle.path, configs, threads)
        player = Player(bundle.plan, static_backend(bundle.plan, sessions, device), bundle.tables())
        return Runtime(bundle, player, chosen, uncaptured, one_at_a_time=True)
    sessions = {name: make_session(file, bundle.path, configs[name], threads) for name, file in files.items()}
    return Runtime(bundle, Player(bundle.plan, OrtBackend(sessions, device), bundle.tables()), chosen)


def quant_traits(manifest: Manifest, graph: str | None = None) -> QuantTraits:
    """What session options need to know of the layer table: of one graph, or of all (None)."""
    rows = [row for row in manifest.layers if row.get("algorithm") and graph in (None, row.get("graph"))]
    quantised = [row for row in rows if row.get("activation_format")]
    return QuantTraits(
        weight_only=frozenset(str(row["format"]) for row in rows if not row.get("activation_format")),
        with_activations=frozenset(str(row["format"]) for row in quantised),
        activations=frozenset(str(row["activation_format"]) for row in quantised),
        per_token=any(row.get("activation_scales") == str(PerToken()) for row in quantised),
        integer=any(_is_integer(row, {"int8", "int6"}) for row in quantised),
        two_bit=any(_is_integer(row, {"int2", "ternary"}) for row in quantised),
        convolution=any(_is_convolution(row) for row in rows),
        integer_convolution=any(_is_convolution(row) and row["activation_format"] == "int8" for row in quantised),
    )


def _is_integer(row: Mapping[str, Any], weights: Set[str]) -> bool:
    """Whether a layer is a matrix in one of these formats, with int8 inputs of a known scale."""
    formats = row.get("format") in weights and row.get("activation_format") == "int8"
    return formats and not _is_convolution(row) and row.get("activation_scales") != str(PerToken())


def _is_convolution(row: Mapping[str, Any]) -> bool:
    return len(row.get("shape", ())) == CONVOLUTION_DIMENSIONS
