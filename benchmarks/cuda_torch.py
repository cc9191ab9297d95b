"""torch's part of the CUDA table: the same work eagerly and compiled; runs in a process of its own (`cuda_parts`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from cuda_parts import SEED, DeviceMemory, Runs, Subject, Tell, timed


def torch_part(tell: Tell, subject: Subject, device: str, compiled: bool, runs: Runs) -> None:
    """The same work in torch, in fp16 on a GPU: a denoiser as a whole, a VAR's products (the rest under autocast)."""
    memory = DeviceMemory(device, torch_too=True)
    import torch

    from qexport.reference.backend import TorchBackend
    from qexport.runtime import Player

    generator = load_model(subject)
    half = device == "cuda"
    for spec in generator.graphs:
        if half and spec.name == subject.forward:
            spec.module.half()
        elif half:
            halve_products(spec.module)
        if subject.forward in (None, spec.name):
            spec.module.to(device)
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            spec.module.compile(mode="reduce-overhead" if half else "default")

    class OnDevice(TorchBackend):
        """Images come back in float32, whatever they were computed in."""

        def get(self, value: torch.Tensor) -> np.ndarray:
            return super().get(value.float().cpu())

        def run(self, graph: str, feeds: Any, outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
            with autocast(device, half and graph != subject.forward):
                found = super().run(graph, feeds, outputs)
            return {name: value.clone() for name, value in found.items()} if compiled else found

    backend = OnDevice(generator)
    loaded = memory.taken()
    for batch in subject.batches:
        if subject.forward is None:
            player = Player(generator.plan, backend, generator.tables)
            labels = [i % generator.entry.num_classes for i in range(batch)]
            found = timed(lambda player=player, labels=labels: player.play({"label": labels}), runs)
        else:
            spec = generator.graph(subject.forward)
            values = {name: backend.put(array) for name, array in torch_feeds(spec, batch).items()}
            outputs = tuple(port.name for port in spec.outputs)

            def forward(values: Mapping[str, torch.Tensor] = values, outputs: tuple[str, ...] = outputs) -> None:
                backend.run(str(subject.forward), values, outputs)
                if half:
                    torch.cuda.synchronize()

            found = timed(forward, runs)
        tell(batch, {**found, "device_bytes_loaded": loaded, "device_bytes_after": memory.taken()})


def halve_products(module: Any) -> None:
    """Weights of products and convolutions to float16, which autocast would otherwise do again at every call."""
    import torch

    for inner in module.modules():
        if isinstance(inner, (torch.nn.Linear, torch.nn.Conv2d)):
            inner.half()


def torch_feeds(spec: Any, batch: int) -> dict[str, np.ndarray]:
    """As `feeds`, for a graph's torch module."""
    rng = np.random.default_rng(SEED)
    found = {}
    for port in spec.inputs:
        shape = [batch if isinstance(size, str) else size for size in port.shape]
        real = rng.normal(size=shape) if shape and port.name != "row" else np.ones(shape)
        found[port.name] = np.ones(shape, np.int64) if port.dtype == "int64" else np.asarray(real, port.dtype)
    return found


@contextlib.contextmanager
def autocast(device: str, wanted: bool) -> Iterator[None]:
    import torch

    with torch.autocast(device, torch.float16) if wanted else contextlib.nullcontext():
        yield


def load_model(subject: Subject) -> Any:
    from qexport.family import find_model, load_random

    if subject.random:
        return load_random(subject.name, SEED)
    family, entry = find_model(subject.name)
    return family.load(entry, None, None)
