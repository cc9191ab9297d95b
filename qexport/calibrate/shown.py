"""What a model is fed while its calls are recorded: its own trajectories, or what images make of them.

**Its own.** The plan is played as it stands.

**Images, of a model that draws tokens.** The model's own encoder makes tokens of them, and the plan is played with its
draws forced to these (`qexport.reference.forced`): every call sees the past that the image gives it, in both branches
of guidance. Guidance itself is off, since it acts on logits alone, which decide nothing here.

**Images, of a denoiser.** The model's own encoder makes latents x of them. At each step of the schedule the graph is
fed √ᾱ_t·x + √(1 − ᾱ_t)·ε with the step's own timestep t and noise ε of the image, further numbers at each step; the
first step gets pure noise, as in sampling. Nothing is denoised: inputs are all that is wanted. A decoder is fed x.

Legend: B images of a batch, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.errors import InputError
from qexport.family import DenoiseSpec, Generator
from qexport.plan import Call, Plan
from qexport.reference.device import device_of
from qexport.reference.forced import UNGUIDED, ForcedBackend
from qexport.reference.timestep import timestep_place
from qexport.reference.wrapped import WrappedBackend
from qexport.runtime import Backend, Player
from qexport.runtime.inputs import label_input
from qexport.runtime.noise import NoiseStream


def require_encoder(generator: Generator) -> None:
    """Refuse a model that no images can be shown to.

    Raises:
        InputError: its family offers neither tokens nor latents of images.
    """
    if generator.denoise is None and (generator.draw is None or generator.quality is None):
        raise InputError(
            f"{generator.entry.name}: the family offers no encoder, so it cannot be calibrated on images; leave "
            "--calibration-data out"
        )


@dataclass(frozen=True)
class Shown:
    """A player for one batch and its inputs by name."""

    player: Player[Tensor]
    inputs: Mapping[str, Any]


def own_samples(player: Player[Tensor], labels: np.ndarray) -> Shown:
    """The plan as it stands, with labels (B,)."""
    return Shown(player, _labelled(player.plan, labels))


def from_images(
    generator: Generator,
    player: Player[Tensor],
    pixels: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    first_index: int,
) -> Shown:
    """A player of the generator's plan that is led by images: uint8 pixels (B, H, W, 3), int64 labels (B,).

    Noise is that of image ``first_index + i`` under `seed`.

    Raises:
        InputError: the model has no encoder.
    """
    require_encoder(generator)
    plan, inputs = player.plan, _labelled(player.plan, labels)
    images_BCHW = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / 255)
    images_BCHW = images_BCHW.to(device_of(generator))
    if generator.draw is not None and generator.quality is not None:
        tokens_BL = generator.quality.tokenize(images_BCHW).cpu().numpy()
        backend = ForcedBackend(player.backend, generator.draw, tokens_BL)
        known = {spec.name for spec in plan.inputs}
        inputs = {**inputs, **{name: value for name, value in UNGUIDED.items() if name in known}}
        return Shown(Player(plan, backend, generator.tables), inputs)
    assert generator.denoise is not None
    latents_BChw = generator.denoise.model.encode(images_BCHW).cpu()
    call = next(call for call in plan.calls if call.graph == generator.denoise.graph)
    timesteps = timesteps_of(generator, generator.denoise, call, latents_BChw.numpy(), labels)
    noise = NoiseStream(seed, first_index, len(labels))
    backend = NoisedBackend(player.backend, generator.denoise, latents_BChw, timesteps, noise)
    return Shown(Player(plan, backend, generator.tables), inputs)


def timesteps_of(
    generator: Generator, spec: DenoiseSpec, call: Call, latents_BChw: np.ndarray, labels: np.ndarray
) -> list[int]:
    """The training timestep of each iteration of the denoising call.

    Raises:
        InputError: the plan does not take it from a row of a table.
    """
    port, place = timestep_place(spec.model, latents_BChw, labels)
    kind, _, table = call.inputs[port].partition(".")
    if kind != "row":
        raise InputError(f"{generator.entry.name}: its plan has no table of timesteps to spread images over")
    return [round(float(np.asarray(row).reshape(-1)[place])) for row in generator.tables[table][: call.iterations]]


class NoisedBackend(WrappedBackend[Tensor]):
    """A backend whose denoising graph does nothing but hand out, for each next step, the latents noised to it."""

    def __init__(
        self,
        backend: Backend[Tensor],
        spec: DenoiseSpec,
        latents_BChw: Tensor,
        timesteps: list[int],
        noise: NoiseStream,
    ) -> None:
        """Wrap `backend` for one play; `timesteps` are those of all calls of the denoising graph, in order."""
        super().__init__(backend)
        self._spec, self._latents, self._timesteps = spec, latents_BChw, timesteps
        self._noise, self._next = noise, 1

    def run(self, graph: str, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Run a graph; the denoising one is not run, and after its last call come the latents themselves."""
        if graph != self._spec.graph:
            return self._backend.run(graph, feeds, outputs)
        latents = self._latents
        if self._next < len(self._timesteps):
            t = torch.full((len(latents),), self._timesteps[self._next])
            noise = torch.from_numpy(self._noise.draw("normal", tuple(latents.shape[1:])))
            latents = self._spec.model.add_noise(latents, noise, t)
        self._next += 1
        return {self._spec.state: self._backend.put(latents.numpy())}


def _labelled(plan: Plan, labels: np.ndarray) -> dict[str, Any]:
    port = label_input(plan)
    return {port.name: labels} if port else {}
