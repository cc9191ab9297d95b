"""Quality against the full-precision model: how far the quantised model's predictions are from its own.

Teacher forced and without guidance: both models see the same tokens before each position, and their distributions of
the next token are compared. Per position, averaged over positions and samples:

- `kl`: KL(fp ‖ quantised) in nats; 0 is the same distribution
- `top1_agreement`: share of positions at which both have the same most likely token
- `top900_agreement`: |top-900 ∩ top-900| / 900, the candidates that the published sampler draws from
- `cross_entropy`: −log q(token) in nats, of both models, where the tokens are those of real images

The tokens come from real images, or from the full-precision model itself, drawn without guidance and without filters:
then KL is the exact divergence between the two models' distributions of images, divided by the number of tokens.

Only one batch of logits is held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from onnxruntime import OrtValue
from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.family import DrawSpec, Generator
from qexport.numerics.metrics import cross_entropy, kl_divergence, top1_agreement, topk_agreement
from qexport.reference.backend import torch_player
from qexport.reference.device import device_of
from qexport.reference.forced import UNGUIDED, forced_logits
from qexport.runtime import Player
from qexport.runtime.inputs import label_input
from qexport.verify.images import ImageSet

TOP_K = 900
"""Candidates of the published VAR sampler; with a smaller vocabulary, all of it."""

Student = Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]]
"""Labels (B,) and tokens (B, L) → unguided logits under teacher forcing, (B, l, V) in turn, Σ l = L."""

Batches = Iterator[tuple[np.ndarray, np.ndarray]]
"""Labels (B,) and tokens (B, L), int64."""


class _Scored(Protocol):
    def __call__(self, p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> float: ...


def _top_k(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> float:
    return topk_agreement(p, q, min(TOP_K, p.shape[-1]))


_SCORES: dict[str, _Scored] = {
    "kl": lambda p, q, tokens: kl_divergence(p, q),
    "top1_agreement": lambda p, q, tokens: top1_agreement(p, q),
    "top900_agreement": _top_k,
}
_SCORES_ON_IMAGES: dict[str, _Scored] = {
    "cross_entropy_fp": lambda p, q, tokens: cross_entropy(p, tokens),
    "cross_entropy": lambda p, q, tokens: cross_entropy(q, tokens),
}


@dataclass(frozen=True)
class Quality:
    """Figures over all positions (`figures`) and for each scale (`per_scale`), from `samples` images' tokens."""

    figures: Mapping[str, float]
    per_scale: Mapping[str, Sequence[float]]
    samples: int
    seed: int | None
    source: str

    def to_json(self) -> dict[str, Any]:
        """Plain data: the figures, ``per_scale``, ``n``, ``seed`` (null for images), ``source``."""
        scales = {name: list(values) for name, values in self.per_scale.items()}
        return {**self.figures, "per_scale": scales, "n": self.samples, "seed": self.seed, "source": self.source}


def measure_quality(
    teacher: Generator,
    student: Student,
    batches: Batches,
    *,
    on_images: bool,
    seed: int | None,
    source: str,
    progress: Callable[[int], None] | None = None,
) -> Quality:
    """Compare a student with the full-precision model, batch by batch.

    Args:
        teacher: the full-precision model.
        student: gives the other logits; see `torch_student` and `runtime_student`.
        batches: labels and tokens; see `drawn_by` and `tokens_of`.
        on_images: the tokens are those of real images, so cross-entropy means something.
        seed: of the drawn tokens.
        source: what the tokens are, in words.
        progress: told how many samples are done.

    Raises:
        UnsupportedError: the model has no teacher forcing.
    """
    if teacher.quality is None:
        raise UnsupportedError(f"{teacher.entry.name}: the family offers no teacher forcing")
    forced = torch_logits(teacher)
    lengths = list(teacher.quality.scale_lengths)
    bounds = np.cumsum([0, *lengths])
    scores = {**_SCORES, **(_SCORES_ON_IMAGES if on_images else {})}
    sums = {name: np.zeros(len(lengths)) for name in scores}
    samples = 0
    for labels, tokens_BL in batches:
        p_BLV = forced(labels, tokens_BL).cpu().numpy()
        q_BLV = np.concatenate(student(labels, tokens_BL), axis=1)
        samples += len(labels)
        for scale in range(len(lengths)):
            part = slice(bounds[scale], bounds[scale + 1])
            for name, score in scores.items():
                sums[name][scale] += score(p_BLV[:, part], q_BLV[:, part], tokens_BL[:, part]) * len(labels)
        if progress is not None:
            progress(samples)
    weights = np.asarray(lengths) / sum(lengths)
    return Quality(
        figures={name: float(values @ weights) / samples for name, values in sums.items()},
        per_scale={name: [float(v) / samples for v in values] for name, values in sums.items()},
        samples=samples,
        seed=seed,
        source=source,
    )


def torch_student(generator: Generator) -> Student:
    """A torch model as the student: the quantised reference, or any other."""
    logits = torch_logits(generator)
    return lambda labels, tokens_BL: [logits(labels, tokens_BL).cpu().numpy()]


def torch_logits(generator: Generator) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """Labels (B,) and tokens (B, L) → logits (B, L, V), where the model lies."""
    quality, device = generator.quality, device_of(generator)
    if quality is None:
        raise UnsupportedError(f"{generator.entry.name}: the family offers no teacher forcing")
    return lambda labels, tokens_BL: quality.teacher_forced_logits(
        *(torch.from_numpy(array).to(device) for array in (labels, tokens_BL))
    )


def runtime_student(player: Player[OrtValue], draw: DrawSpec, tables: Mapping[str, np.ndarray]) -> Student:
    """The bundle itself as the student, as its sessions compute it."""
    return lambda labels, tokens_BL: forced_logits(player, draw, labels, tokens_BL, tables)


def drawn_by(generator: Generator, samples: int, seed: int, batch: int) -> Batches:
    """Tokens that a model draws itself, unguided and unfiltered; sample i has class i modulo the number of classes.

    Raises:
        UnsupportedError: the model draws no tokens.
    """
    draw = generator.draw
    if draw is None:
        raise UnsupportedError(f"{generator.entry.name} draws no tokens")
    player = torch_player(generator)
    known = {spec.name for spec in player.plan.inputs}
    port = label_input(player.plan)
    call = next(call for call in player.plan.calls if call.graph == draw.graph)
    off = {call.inputs[port_name].partition(".")[2]: 0 for port_name in (draw.top_k, draw.top_p)}
    settings = off | {name: value for name, value in UNGUIDED.items() if name in known}
    for start in range(0, samples, batch):
        labels = np.arange(start, min(start + batch, samples), dtype=np.int64) % generator.entry.num_classes
        found: list[np.ndarray] = []
        player.play(
            {**settings, port.name: labels} if port else settings,
            seed=seed,
            first_index=start,
            batch=len(labels),
            observer=lambda record, found=found: (
                found.append(record.results[draw.tokens].cpu().numpy()) if record.graph == draw.graph else None
            ),
            extra_outputs={draw.graph: (draw.tokens,)},
        )
        yield labels, np.concatenate(found, axis=1)


def tokens_of(generator: Generator, images: ImageSet, batch: int) -> Batches:
    """The tokens of given images."""
    if generator.quality is None:
        raise UnsupportedError(f"{generator.entry.name}: the family offers no teacher forcing")
    for pixels, labels in images.batches(batch):
        yield labels, generator.quality.tokenize(torch.from_numpy(pixels).to(device_of(generator))).cpu().numpy()
