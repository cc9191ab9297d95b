"""The control: does a discrete space forgive, or autoregression? A denoiser is given the one without the other.

DDIM without noise or guidance (arXiv:2010.02502, equation 12, η = 0), so that a trajectory is a function of its first
noise. At every step ε = ε_θ(x_t), x̂₀ = (x_t − √(1 − ᾱ_t)·ε)/√ᾱ_t, x_(t′) = √ᾱ_(t′)·x̂₀ + √(1 − ᾱ_(t′))·ε. Where:

- `none`: as it is
- `end`: the last x̂₀ is put onto the codebook
- `each`: every x̂₀ is, before it is used; so the trajectory passes through a discrete space as VAR's does, without
  anything being drawn

Full precision and quantised model go the same way, from the same noise; what is compared is how far apart they end, and
how many codes differ on the way.

Intervals are of drawing images; all ways are compared on the same ones.

Legend: B images, C latent channels, H W latent side, S steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.family import DenoiserModel, Generator
from qexport.reference import torch_player
from qexport.runtime.noise import NoiseStream
from qexport.scaling.analysis.codebook import Codebook
from qexport.scaling.analysis.resampled import Resampled, estimate, relative_l2, squares, to_json
from qexport.verify.trajectory import labels_for

STEPS = 25
NONE, END, EACH = "none", "end", "each"
WAYS = (NONE, END, EACH)


@dataclass(frozen=True)
class Control:
    """Of one way: `error` ‖x̂₀_q − x̂₀‖ / ‖x̂₀‖ of the clean latents handed on, and `flip` the share of differing codes.

    Each (S,), noisiest step first; the last is where the trajectory ends. `flip` counts the codes nearest to x̂₀ also
    where they are not used. `before` is the error of x̂₀ before it was put onto the codebook. `over_continuous` is the
    error at the end over that of the way `none`, a scalar.
    """

    way: str
    error: Resampled
    before: Resampled
    flip: Resampled
    over_continuous: Resampled
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        figures = {"error": self.error, "before": self.before, "flip": self.flip}
        return {"way": self.way, **to_json({**figures, "over_continuous": self.over_continuous}), "n": self.samples}


def timesteps_of(model: DenoiserModel, steps: int = STEPS) -> list[int]:
    """Every (T/steps)-th timestep, noisiest first."""
    return list(range(0, model.timesteps, model.timesteps // steps))[::-1]


@torch.no_grad()
def sample(
    model: DenoiserModel, first_BCHW: Tensor, labels_B: Tensor, book: Codebook, way: str, steps: int = STEPS
) -> tuple[list[Tensor], list[Tensor]]:
    """x̂₀ of every step (S tensors (B, C, H, W)) as it was predicted, and as it was handed on."""
    x_BCHW, channels = first_BCHW, first_BCHW.shape[1]
    predicted, used = [], []
    times = timesteps_of(model, steps)
    one, zero = torch.ones_like(x_BCHW), torch.zeros_like(x_BCHW)
    for number, t in enumerate(times):
        t_B = torch.full((len(x_BCHW),), t, dtype=torch.int64)
        eps = model.denoise(x_BCHW, t_B, labels_B)[:, :channels]
        # √ᾱ_t and √(1 − ᾱ_t), asked of the model's own forward process.
        clean = (x_BCHW - model.add_noise(zero, eps, t_B)) / model.add_noise(one, zero, t_B)
        predicted.append(clean)
        last = number == len(times) - 1
        if way == EACH or (way == END and last):
            clean = book.snap(clean)
        used.append(clean)
        if not last:
            next_B = torch.full_like(t_B, times[number + 1])
            x_BCHW = model.add_noise(clean, eps, next_B)
    return predicted, used


def controls(
    full: Generator, quantised: Generator, book: Codebook, *, samples: int, seed: int = 0, batch: int = 20
) -> list[Control]:
    """Every way, on `samples` trajectories.

    Raises:
        UnsupportedError: the model does not denoise.
    """
    if full.denoise is None or quantised.denoise is None:
        raise UnsupportedError(f"{full.entry.name} does not denoise")
    ours, theirs = full.denoise.model, quantised.denoise.model
    labels = labels_for(samples, full.entry.num_classes)
    found: list[Control] = []
    for way in WAYS:
        rows: dict[str, list[np.ndarray]] = {"used": [], "before": [], "flip": []}  # one entry a batch, (…, S, B)
        for start in range(0, samples, batch):
            labels_B = torch.from_numpy(labels[start : start + batch])
            first = _first(full, seed, start, len(labels_B))
            wanted, other = (sample(model, first, labels_B, book, way) for model in (ours, theirs))
            for name, ours_S, theirs_S in (("before", wanted[0], other[0]), ("used", wanted[1], other[1])):
                rows[name].append(_squares(theirs_S, ours_S))
            differ = [book.indices(b) != book.indices(a) for a, b in zip(wanted[0], other[0], strict=True)]
            rows["flip"].append(torch.stack(differ).flatten(2).double().mean(dim=2).numpy())
        sums = {name: np.moveaxis(np.concatenate(parts, axis=-1), -1, 0) for name, parts in rows.items()}
        error, before = (estimate(relative_l2, sums[name][:, 0], sums[name][:, 1]) for name in ("used", "before"))
        flip = estimate(lambda mean: mean, sums["flip"])
        continuous = found[0].error if found else error
        found.append(Control(way, error, before, flip, error[-1] / continuous[-1], samples))
    return found


def _squares(found_S: list[Tensor], wanted_S: list[Tensor]) -> np.ndarray:
    """Σ (a − b)² and Σ b² of every step and image, (2, S, B)."""
    pairs = zip(found_S, wanted_S, strict=True)
    return np.stack([squares(a.numpy(), b.numpy(), len(a)) for a, b in pairs], axis=1)


def decoded(
    generator: Generator, book: Codebook, way: str, *, images: int, seed: int = 0, batch: int = 20
) -> Iterator[np.ndarray]:
    """Images (b, 3, side, side) in [0, 1] that a model samples in one way, for FD.

    Raises:
        UnsupportedError: the model does not denoise.
    """
    if generator.denoise is None:
        raise UnsupportedError(f"{generator.entry.name} does not denoise")
    backend, call = torch_player(generator).backend, generator.plan.calls[-1]
    (port,), (image,) = call.inputs, call.outputs
    labels = labels_for(images, generator.entry.num_classes)
    for start in range(0, images, batch):
        labels_B = torch.from_numpy(labels[start : start + batch])
        first = _first(generator, seed, start, len(labels_B))
        _, used = sample(generator.denoise.model, first, labels_B, book, way)
        yield backend.run(call.graph, {port: used[-1]}, (image,))[image].numpy()


def _first(generator: Generator, seed: int, start: int, count: int) -> Tensor:
    """The noise that images `start` … begin with, as the player draws it."""
    shape = next(state.shape for state in generator.plan.state if state.init != "zeros")[1:]
    return torch.from_numpy(NoiseStream(seed, start, count).draw("normal", tuple(int(size) for size in shape)))
