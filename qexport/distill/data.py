"""What a student is shown: samples of the teacher itself, tokens of given images, or latents of real trajectories.

Default: the teacher's own samples, so that no data set is needed. Tokens are drawn without guidance and without
filters, so that forward KL on them is the divergence of the two models' distributions of images. Sample i has class i
modulo the number of classes and the noise of image i under `seed`.

A `share` of the labels is then replaced by the null class, number `num_classes` by the convention of these families:
the unconditional half of guidance, which quantisation hurts too, is taught as it was trained, by dropping labels.

Samples are held as whole arrays on the CPU (tokens: 1.2 kB an image of 155 tokens) and split into what is trained on
and what is held out. A batch depends on seed and step alone, so that a run that is cut off goes on with the very batch
it would have had next.

Legend: N samples, B batch, L tokens, C h w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.distill.tasks import Batch
from qexport.errors import InputError
from qexport.family import Generator
from qexport.reference import TorchBackend
from qexport.reference.timestep import timestep_place
from qexport.runtime import CallRecord, Player
from qexport.runtime.inputs import label_input

DRAW_BATCH = 32
_GUIDANCE = "cfg"
"""The plan's input for guidance, by convention called so; 0 turns it off."""

Progress = Callable[[int, int], None]
"""Told (samples done, samples in all)."""


@dataclass(frozen=True)
class Samples:
    """Tensors of N samples each, as `qexport.distill.tasks` takes them; `source` says what they are, in words."""

    tensors: Batch
    source: str

    def __len__(self) -> int:
        return len(self.tensors[0])

    def split(self, held_out: int) -> tuple[Samples, Samples]:
        """All but the last `held_out`, and those.

        Raises:
            InputError: nothing would be left to train on.
        """
        if not 0 < held_out < len(self):
            raise InputError(f"{len(self)} samples, {held_out} of them held out: nothing is left; take more samples")
        cut = len(self) - held_out
        first, last = (tuple(part) for part in zip(*((t[:cut], t[cut:]) for t in self.tensors), strict=True))
        return Samples(first, self.source), Samples(last, self.source)

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of a step: a permutation of all samples for each pass through them, cut into batches."""
        index = self.numbers(step, size, seed)
        return tuple(tensor[index] for tensor in self.tensors)

    def numbers(self, step: int, size: int, seed: int) -> Tensor:
        """Which samples the batch of a step holds, (size,) int64."""
        positions = range(step * size, (step + 1) * size)
        orders = {epoch: self._order(epoch, seed) for epoch in {p // len(self) for p in positions}}
        return torch.stack([orders[p // len(self)][p % len(self)] for p in positions])

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order."""
        for start in range(0, len(self), size):
            yield tuple(tensor[start : start + size] for tensor in self.tensors)

    def _order(self, epoch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * _EPOCHS + epoch)
        return torch.randperm(len(self), generator=generator)


_EPOCHS = 1 << 20
"""More passes through the samples than any run makes, so that no two seeds share an order."""


def drawn_tokens(generator: Generator, samples: int, seed: int, progress: Progress | None = None) -> Samples:
    """Labels (N,) and tokens (N, L) that a model draws itself, unguided and unfiltered.

    Raises:
        InputError: the model draws no tokens.
    """
    draw = generator.draw
    if draw is None:
        raise InputError(f"{generator.entry.name} draws no tokens")
    drawing = tuple(call for call in generator.plan.calls if call.graph == draw.graph)  # pixels are not needed
    player = Player(replace(generator.plan, calls=drawing), TorchBackend(generator), generator.tables)
    port = label_input(player.plan)
    call = drawing[0]
    plain: dict[str, Any] = {call.inputs[name].partition(".")[2]: 0 for name in (draw.top_k, draw.top_p)}
    if any(given.name == _GUIDANCE for given in player.plan.inputs):
        plain[_GUIDANCE] = 0.0
    found: list[np.ndarray] = []

    def keep(record: CallRecord[Tensor]) -> None:
        if record.graph == draw.graph:
            parts.append(record.results[draw.tokens].cpu().numpy())

    labels = _labels(generator, samples)
    for start in range(0, samples, DRAW_BATCH):
        parts: list[np.ndarray] = []
        given = labels[start : start + DRAW_BATCH]
        player.play(
            {**plain, port.name: given} if port else plain,
            seed=seed,
            first_index=start,
            batch=len(given),
            observer=keep,
            extra_outputs={draw.graph: (draw.tokens,)},
        )
        found.append(np.concatenate(parts, axis=1))
        if progress is not None:
            progress(start + len(given), samples)
    source = f"{samples} samples that the full-precision model drew, unguided, seed {seed}"
    return Samples((torch.from_numpy(labels), torch.from_numpy(np.concatenate(found))), source)


def image_tokens(generator: Generator, batches: Iterator[tuple[np.ndarray, np.ndarray]], source: str) -> Samples:
    """Labels (N,) and tokens (N, L) of images: batches of pixels (B, 3, H, W) float32 in [0, 1] and labels (B,).

    Raises:
        InputError: there are none, or the model has no tokens.
    """
    if generator.quality is None:
        raise InputError(f"{generator.entry.name}: the family offers no tokens of images")
    labels, tokens = [], []
    for pixels, given in batches:
        tokens.append(generator.quality.tokenize(torch.from_numpy(pixels)))
        labels.append(torch.from_numpy(np.asarray(given, np.int64)))
    if not tokens:
        raise InputError(f"{source}: holds no images")
    return Samples((torch.cat(labels), torch.cat(tokens)), source)


def drawn_latents(
    generator: Generator, samples: int, seed: int, per_trajectory: int, progress: Progress | None = None
) -> Samples:
    """Noisy latents (N, C, h, w), timesteps and labels (N,) from the teacher's own trajectories.

    Guided as the plan does by default; of each trajectory `per_trajectory` steps are kept, evenly spread and shifted
    from image to image, so that all are met.

    Raises:
        InputError: the model does not denoise.
    """
    spec = generator.denoise
    if spec is None:
        raise InputError(f"{generator.entry.name} does not denoise")
    denoising = tuple(call for call in generator.plan.calls if call.graph == spec.graph)  # pixels are not needed
    player = Player(replace(generator.plan, calls=denoising), TorchBackend(generator), generator.tables)
    port = label_input(player.plan)
    call = denoising[0]
    state = next(source for source in call.inputs.values() if source == f"state.{call.outputs[spec.state]}")
    latent_port = next(name for name, source in call.inputs.items() if source == state)
    stride = max(1, call.iterations // per_trajectory)
    trajectories = -(-samples // len(range(0, call.iterations, stride)))
    labels = _labels(generator, trajectories)
    columns: list[list[np.ndarray]] = [[], [], []]
    place: tuple[str, int] | None = None

    def keep(record: CallRecord[Tensor]) -> None:
        nonlocal place
        if record.graph != spec.graph:
            return
        noisy = record.feeds[latent_port].cpu().numpy()
        place = place or timestep_place(spec.model, noisy, given)
        chosen = (start + np.arange(len(noisy)) + record.iteration) % stride == 0
        t = round(float(record.feeds[place[0]].flatten()[place[1]]))
        columns[0].append(noisy[chosen].copy())
        columns[1].append(np.full(chosen.sum(), t, np.int64))
        columns[2].append(given[chosen])

    for start in range(0, trajectories, DRAW_BATCH):
        given = labels[start : start + DRAW_BATCH]
        player.play({port.name: given} if port else {}, seed=seed, first_index=start, batch=len(given), observer=keep)
        if progress is not None:
            progress(min((start + len(given)) * samples // trajectories, samples), samples)
    mixed = torch.randperm(sum(map(len, columns[0])), generator=torch.Generator().manual_seed(seed))
    tensors = tuple(torch.from_numpy(np.concatenate(column))[mixed][:samples] for column in columns)
    source = f"{len(tensors[0])} noisy latents of {trajectories} trajectories of the full-precision model, seed {seed}"
    return Samples(tensors, source)


def with_null_labels(samples: Samples, column: int, null: int, share: float, seed: int) -> Samples:
    """The same samples with a `share` of the labels, in tensor number `column`, replaced by the null class."""
    drawn = torch.rand(len(samples), generator=torch.Generator().manual_seed(seed))
    tensors = list(samples.tensors)
    tensors[column] = torch.where(drawn < share, null, tensors[column])
    return Samples(tuple(tensors), samples.source)


def _labels(generator: Generator, samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.int64) % generator.entry.num_classes
