"""The model in torch, eager or compiled, behind the same plan: what anyone would run without qexport.

On the CPU it computes in float32. On CUDA a denoiser's or a transformer's graphs run under autocast to float16, which
is what its users do; results are cloned there, since a CUDA graph writes the next ones over them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qexport.bundle.manifest import ModelInfo
from qexport.family import Generator, find_model, load_random, random_seed
from qexport.reference.backend import TorchBackend
from qexport.runtime import Player

RECOMPILE_LIMIT = 64
"""Every scale of a VAR has its own shapes; torch's own limit of 8 would let the rest run eagerly."""


def make_torch_player(
    model: ModelInfo, device: str, compiled: bool, checkpoint: str | None = None, vae_checkpoint: str | None = None
) -> Player[Tensor]:
    """A player of the model on `device` (``"cpu"`` or ``"cuda"``).

    Raises:
        InputError: its weights are not at hand.
    """
    return play_in_torch(load_generator(model, checkpoint, vae_checkpoint), device, compiled)


def play_in_torch(generator: Generator, device: str = "cpu", compiled: bool = False) -> Player[Tensor]:
    """A player of a loaded model; its modules are moved to the device and compiled in place."""
    if compiled:
        torch._dynamo.config.capture_scalar_outputs = True  # top-k is a tensor; without it the graph breaks there
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for spec in generator.graphs:
        spec.module.to(device)
        if compiled:
            spec.module.compile(mode="reduce-overhead" if device == "cuda" else "default")
    return Player(generator.plan, DeviceBackend(generator, compiled), generator.tables)


def load_generator(model: ModelInfo, checkpoint: str | None = None, vae_checkpoint: str | None = None) -> Generator:
    """The model that a bundle was made of.

    Raises:
        InputError: its weights are not at hand.
    """
    seed = random_seed(model.source)
    if seed is not None:
        return load_random(model.name, seed)
    family, entry = find_model(model.name)
    return family.load(entry, checkpoint, vae_checkpoint)


class DeviceBackend(TorchBackend):
    """On CUDA it computes under autocast."""

    def __init__(self, generator: Generator, compiled: bool) -> None:
        """Take the generator, where its modules lie by now; `compiled`: what they return is written over."""
        super().__init__(generator)
        self._compiled = compiled

    def get(self, value: Tensor) -> np.ndarray:
        """The tensor as an array; float16 as float32."""
        return super().get(value.float() if value.dtype == torch.float16 else value)

    def run(self, graph: str, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Call one module."""
        if self._device.type == "cpu":
            return super().run(graph, feeds, outputs)
        with torch.autocast(self._device.type, torch.float16):
            found = super().run(graph, feeds, outputs)
        torch.cuda.synchronize()  # so that each graph's time is its own
        return {name: value.clone() for name, value in found.items()} if self._compiled else found
