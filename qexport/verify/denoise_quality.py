"""Quality of a quantised denoiser against the full-precision model: its output, and where its trajectories end.

Output. Both models see the same noisy latents x_t = add_noise(latents, ε, t): those of given images, or of images that
the full-precision model drew itself. Image i of n has the timestep t_i = ⌊i (T − 1)/(n − 1)⌋, so that they are spread
over all, and the noise of image i of the players' generator. No guidance. Where images are sorted by class, each class
meets only some timesteps; that moves the figures (dit-c10-d2 at 3 bits: 0.0139 sorted, 0.0118 shuffled), so compare
like with like.
On the noise channels, over all images:

- `output_mse` = Σ (ε_q − ε_fp)² / Σ ε_fp²: the squared error relative to the power of the full-precision output
- `loss`, `loss_fp` = mean (ε_θ − ε)²: the loss that the model was trained on (arXiv:2006.11239, equation 14)

Trajectory. Both sample freely from the same noise with the plan's guidance; `trajectory_error` is the relative L2
‖x_q − x_fp‖ / ‖x_fp‖ of the final latents over all images, and `per_step` the same after every step.

Legend: N images, C latent channels, H W latent side, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from qexport.errors import InputError
from qexport.family import DenoiserModel, DenoiseSpec
from qexport.numerics.metrics import relative_l2
from qexport.runtime import CallRecord, Player
from qexport.runtime.inputs import label_input
from qexport.runtime.noise import NoiseStream
from qexport.verify.differences import Sums

RANGES = 4
"""`output_mse` is also given for each quarter of the timesteps."""

DEFAULT_BATCH = 50

V = TypeVar("V")
W = TypeVar("W")


@dataclass(frozen=True)
class Probe:
    """What both models are asked: noisy latents (N, C, H, W), the noise in them, timesteps and labels (N,) int64."""

    noisy: np.ndarray
    noise: np.ndarray
    t: np.ndarray
    labels: np.ndarray
    timesteps: int

    def __len__(self) -> int:
        return len(self.t)


Student = Callable[[Probe], np.ndarray]
"""The noise (N, C, H, W) that a model sees in a probe; see `torch_student` and `runtime_student`."""


@dataclass(frozen=True)
class OutputQuality:
    """See module. `per_range` is `output_mse` in each of `RANGES` equal ranges of timesteps, least noisy first."""

    output_mse: float
    loss: float
    loss_fp: float
    per_range: tuple[float, ...]
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain data: the figures, ``per_range``, ``n``."""
        figures = {"output_mse": self.output_mse, "loss": self.loss, "loss_fp": self.loss_fp}
        return {**figures, "per_range": list(self.per_range), "n": self.samples}


@dataclass(frozen=True)
class Trajectories:
    """What one model made: latents after every step (S, N, C, H, W), and images (N, 3, side, side) in [0, 1]."""

    states: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class TrajectoryQuality:
    """See module."""

    trajectory_error: float
    per_step: tuple[float, ...]
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``trajectory_error``, ``per_step``, ``n``."""
        return {"trajectory_error": self.trajectory_error, "per_step": list(self.per_step), "n": self.samples}


def make_probe(
    model: DenoiserModel,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int = 0,
    batch: int = DEFAULT_BATCH,
    device: str | torch.device = "cpu",
) -> Probe:
    """A probe from images (N, 3, side, side) float32 in [0, 1] and their labels (N,); the model lies on `device`.

    Raises:
        InputError: there are no images, or not one label each.
    """
    if not len(images) or len(images) != len(labels):
        raise InputError(
            f"{len(images)} images and {len(labels)} labels; at least one image is needed, and one label each"
        )
    latents = torch.cat([model.encode(torch.from_numpy(part).to(device)).cpu() for part in _batches(images, batch)])
    noise = NoiseStream(seed, 0, len(images)).draw("normal", tuple(latents.shape[1:]))
    t = np.linspace(0, model.timesteps - 1, len(images)).astype(np.int64)
    noisy = model.add_noise(latents, torch.from_numpy(noise), torch.from_numpy(t))
    return Probe(noisy.numpy(), noise, t, np.asarray(labels, np.int64), model.timesteps)


def torch_student(model: DenoiserModel, batch: int = DEFAULT_BATCH, device: str | torch.device = "cpu") -> Student:
    """The torch modules, on `device`, as they are when called: full precision, or with quantised weights in them."""

    def predict(probe: Probe) -> np.ndarray:
        columns = (probe.noisy, probe.t, probe.labels)
        outputs = [
            model.denoise(*(torch.from_numpy(column[i : i + batch]).to(device) for column in columns)).cpu()
            for i in range(0, len(probe), batch)
        ]
        return torch.cat(outputs)[:, : probe.noise.shape[1]].numpy()

    return predict


StepFeeds = Callable[[int], Mapping[str, np.ndarray]]
"""Timestep → further inputs of the denoising graph: the activation scales of that step."""


def runtime_student(player: Player[V], spec: DenoiseSpec, step_feeds: StepFeeds = lambda t: {}) -> Student:
    """A bundle's graph, as its session computes it; one call per timestep, since a call takes a single one."""

    def predict(probe: Probe) -> np.ndarray:
        backend, found = player.backend, np.empty_like(probe.noise)
        for t in np.unique(probe.t):
            chosen = probe.t == t
            feeds = spec.model.graph_inputs(probe.noisy[chosen], int(t), probe.labels[chosen])
            values = {port: backend.put(array) for port, array in {**feeds, **step_feeds(int(t))}.items()}
            output = backend.get(backend.run(spec.graph, values, (spec.output,))[spec.output])
            found[chosen] = output[:, : found.shape[1]]
        return found

    return predict


def output_quality(probe: Probe, reference: np.ndarray, found: np.ndarray) -> OutputQuality:
    """Figures of the predictions `found` of a quantised model, where full precision gives `reference`.

    Raises:
        InputError: shapes differ.
    """
    return OutputQuality(
        output_mse=relative_l2(found, reference) ** 2,
        loss=_mse(found, probe.noise),
        loss_fp=_mse(reference, probe.noise),
        per_range=tuple(
            relative_l2(found[chosen], reference[chosen]) ** 2
            for chosen in (probe.t * RANGES // probe.timesteps == r for r in range(RANGES))
            if chosen.any()
        ),
        samples=len(probe),
    )


def play_trajectories(
    player: Player[V],
    spec: DenoiseSpec,
    labels: np.ndarray,
    *,
    seed: int = 0,
    first_index: int = 0,
    batch: int = DEFAULT_BATCH,
    inputs: Mapping[str, Any] | None = None,
) -> Trajectories:
    """Sample one image per label, and keep the latents after every step; image i has noise ``first_index + i``.

    For another schedule than the plan's default pass ``player.with_schedule(NAME)``.

    Raises:
        InputError: a label or an input is not valid.
    """
    port = label_input(player.plan)
    if port is None:
        raise InputError("this model takes no class labels by themselves")
    parts: list[np.ndarray] = []
    images: list[np.ndarray] = []
    for start in range(0, len(labels), batch):
        states: list[np.ndarray] = []

        def keep(record: CallRecord[V], states: list[np.ndarray] = states) -> None:
            if record.graph == spec.graph:
                states.append(np.array(player.backend.get(record.results[spec.state])))

        given = {**(inputs or {}), port.name: np.asarray(labels[start : start + batch], np.int64)}
        images.append(
            player.play(
                given,
                seed=seed,
                first_index=first_index + start,
                observer=keep,
                extra_outputs={spec.graph: (spec.state,)},
            )
        )
        parts.append(np.stack(states))
    return Trajectories(np.concatenate(parts, axis=1), np.concatenate(images))


def trajectory_quality(reference: Trajectories, found: Trajectories) -> TrajectoryQuality:
    """How far the trajectories `found` of a quantised model are from the full-precision model's under the same noise.

    Raises:
        InputError: they are not of the same schedule and labels.
    """
    _check_alike(reference, found)
    per_step = tuple(map(relative_l2, found.states, reference.states))
    return TrajectoryQuality(per_step[-1], per_step, reference.states.shape[1])


def compare_trajectories(
    reference: Player[V],
    found: Player[W],
    spec: DenoiseSpec,
    labels: np.ndarray,
    *,
    seed: int = 0,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int], None] | None = None,
) -> tuple[TrajectoryQuality, np.ndarray, np.ndarray]:
    """`trajectory_quality` of both players' trajectories, holding the latents of one batch at a time.

    `progress` is told how many images are done.

    Returns:
        The figures, the reference's images and the other's, (N, 3, side, side) in [0, 1].

    Raises:
        InputError: the two do not play the same number of steps.
    """
    sums: list[Sums] = []
    images: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch]
        wanted = play_trajectories(reference, spec, part, seed=seed, first_index=start, batch=batch)
        other = play_trajectories(found, spec, part, seed=seed, first_index=start, batch=batch)
        _check_alike(wanted, other)
        sums = sums or [Sums() for _ in wanted.states]
        for total, ours, theirs in zip(sums, other.states, wanted.states, strict=True):
            total.add(ours, theirs)
        images[0].append(wanted.images)
        images[1].append(other.images)
        if progress is not None:
            progress(start + len(part))
    per_step = tuple(total.relative_l2 for total in sums)
    quality = TrajectoryQuality(per_step[-1], per_step, len(labels))
    return quality, np.concatenate(images[0]), np.concatenate(images[1])


def _check_alike(reference: Trajectories, found: Trajectories) -> None:
    if reference.states.shape != found.states.shape:
        shapes = f"{found.states.shape} and {reference.states.shape}"
        raise InputError(f"trajectories of shapes {shapes} (steps, images, …) cannot be compared")


def _batches(array: np.ndarray, batch: int) -> list[np.ndarray]:
    return [array[i : i + batch] for i in range(0, len(array), batch)]


def _mse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a.astype(np.float64) - b) ** 2))
