"""One figure of merit for a quantised torch model, measured against the full-precision one: the same for every method.

Models that draw tokens: KL(fp ‖ quantised), top-1 agreement and, on images, cross-entropy, as
`qexport.verify.quality` defines them, but in float32 and without the slow ones. Denoisers: the output
error of `qexport.verify.denoise_quality`. What the full-precision model says is computed once and kept.

A judge may also tell its figures image by image, which bootstrap intervals are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qexport.errors import UnsupportedError
from qexport.family import Generator
from qexport.reference import torch_player
from qexport.reference.device import device_of
from qexport.reference.forced import forced_logits
from qexport.verify.denoise_quality import make_probe, output_quality
from qexport.verify.denoise_quality import runtime_student as plan_denoiser
from qexport.verify.denoise_quality import torch_student as torch_denoiser
from qexport.verify.denoise_rung import step_feeds_of
from qexport.verify.images import open_images
from qexport.verify.quality import drawn_by, tokens_of, torch_logits
from qexport.verify.trajectory import label_inputs, labels_for

BATCH = 16
DRAWN = 32
"""Samples that the full-precision model draws where no images are given."""

Judge = Callable[[Generator, bool], Mapping[str, Any]]
"""A quantised generator, and whether its activations are quantised → figures; see `MERITS` for which one counts."""

KEPT_BYTES = 3 << 30
"""Predictions of the full-precision model are kept up to this size: 500 images of the reference VARs are 1.3 GB."""

_FIGURES = ("kl", "top1_agreement", "cross_entropy_fp", "cross_entropy")

PER_IMAGE = "per_image"
"""The key of the figures image by image, where they are asked for."""

MERITS = ("kl", "output_mse")
"""The figure by which methods are ranked, of whichever kind the model is; smaller is better."""


def merit(figures: Mapping[str, Any]) -> float:
    """The figure that counts."""
    return next(float(figures[name]) for name in MERITS if name in figures)


def merit_name(generator: Generator) -> str:
    """Which figure counts for this model."""
    return MERITS[0] if generator.draw is not None else MERITS[1]


def make_judge(
    full: Generator,
    *,
    images: str | Path | None = None,
    every: int = 1,
    samples: int = DRAWN,
    seed: int = 0,
    per_image: bool = False,
) -> Judge:
    """A judge of quantised versions of `full`, which must not change afterwards, and lie where it does.

    Args:
        full: the full-precision model.
        images: real images instead of `samples` that the model draws itself.
        every: take every n-th of them only.
        samples: see `images`.
        seed: of what is drawn.
        per_image: also give `PER_IMAGE`, float64 arrays (n,) by name. Tokens: the means over each image's positions of
            ``kl``, ``top1_agreement``, ``cross_entropy``, ``cross_entropy_fp`` (of drawn tokens too). Denoisers: the
            sums ``output_error`` and ``output_power``, whose ratio is ``output_mse`` once summed over images, and the
            means ``loss`` and ``loss_fp``.

    Raises:
        UnsupportedError: the model neither draws tokens nor denoises.
        InputError: the images cannot be read.
    """
    if full.draw is not None and full.quality is not None:
        return _token_judge(full, images, every, samples, seed, per_image)
    if full.denoise is not None:
        return _denoiser_judge(full, images, every, samples, seed, per_image)
    raise UnsupportedError(f"{full.entry.name} neither draws tokens nor denoises: methods cannot be compared")


def _token_judge(
    full: Generator, images: str | Path | None, every: int, samples: int, seed: int, per_image: bool
) -> Judge:
    if images is None:
        batches = list(drawn_by(full, samples, seed, BATCH))
        source = f"{samples} samples that the full-precision model drew, unguided"
    else:
        entry = full.entry
        given = open_images(images, size=entry.image_size, num_classes=entry.num_classes, every=every)
        batches, source = list(tokens_of(full, given, BATCH)), given.source

    on_images, device = images is not None, device_of(full)
    wanted = [_log_probabilities(torch_logits(full)(*batch)) for batch in batches] if _small(full, batches) else None

    def judge(quantised: Generator, activations: bool) -> Mapping[str, Any]:
        student = _by_plan(quantised, device) if activations else torch_logits(quantised)
        sums = torch.zeros(len(_FIGURES), dtype=torch.float64)
        positions = 0
        by_image: list[Tensor] = []
        for number, (labels, tokens_BL) in enumerate(batches):
            log_p_NV = wanted[number] if wanted else _log_probabilities(torch_logits(full)(labels, tokens_BL))
            log_q_NV = _log_probabilities(student(labels, tokens_BL))
            terms_FN = _terms(log_p_NV, log_q_NV, torch.from_numpy(tokens_BL).to(device).reshape(-1)).cpu()
            sums += terms_FN.sum(dim=1)
            positions += tokens_BL.size
            by_image.append(terms_FN.unflatten(1, tokens_BL.shape).mean(dim=2))
        figures: dict[str, Any] = dict(zip(_FIGURES, (sums / positions).tolist(), strict=True))
        if not on_images:  # of tokens that the model drew itself, it says nothing about data
            del figures["cross_entropy"], figures["cross_entropy_fp"]
        if per_image:
            figures[PER_IMAGE] = dict(zip(_FIGURES, torch.cat(by_image, dim=1).numpy(), strict=True))
        return figures | {"n": sum(len(labels) for labels, _ in batches), "seed": seed, "source": source}

    return judge


def _small(full: Generator, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether the full-precision model's predictions may be kept instead of being computed for every judgement."""
    if not batches:
        return True
    labels, tokens_BL = batches[0]
    vocabulary = torch_logits(full)(labels[:1], tokens_BL[:1]).shape[-1]
    return sum(tokens_BL.size for _, tokens_BL in batches) * vocabulary * 4 <= KEPT_BYTES


def _log_probabilities(logits_BLV: Tensor) -> Tensor:
    """Logits (B, L, V) → log p (N, V) float32, N positions in the order of the tokens."""
    return torch.log_softmax(logits_BLV, dim=-1).flatten(0, 1)


def _terms(log_p_NV: Tensor, log_q_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """`_FIGURES` of each position, (4, N) float64. Terms are float32 inside: their errors of 1e-7 average out."""
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(dim=-1)
    same_N = log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)
    own = [-x_NV.gather(1, tokens_N[:, None]) for x_NV in (log_p_NV, log_q_NV)]
    return torch.stack([x.to(torch.float64).reshape(-1) for x in (kl_N, same_N, *own)])


def _by_plan(quantised: Generator, device: torch.device) -> Callable[[np.ndarray, np.ndarray], Tensor]:
    """Logits (B, L, V) on `device`, step by step by the plan: scales of activations may change between steps."""
    player, draw = torch_player(quantised), quantised.draw
    assert draw is not None
    return lambda labels, tokens_BL: torch.from_numpy(
        np.concatenate(forced_logits(player, draw, labels, tokens_BL, quantised.tables), axis=1)
    ).to(device)


def _denoiser_judge(
    full: Generator, images: str | Path | None, every: int, samples: int, seed: int, per_image: bool
) -> Judge:
    spec, device = full.denoise, device_of(full)
    assert spec is not None
    if images is None:
        labels = labels_for(samples, full.entry.num_classes)
        player = torch_player(full)
        if full.effort.schedule is not None:
            player = player.with_schedule(full.effort.schedule)
        pixels = np.concatenate(
            [
                player.play(label_inputs(full.plan, labels[i : i + BATCH]), seed=seed, first_index=i)
                for i in range(0, samples, BATCH)
            ]
        )
        source = f"{samples} images that the full-precision model drew"
    else:
        entry = full.entry
        given = open_images(images, size=entry.image_size, num_classes=entry.num_classes, every=every)
        pixels, labels = next(given.batches(len(given)))
        source = given.source
    probe = make_probe(spec.model, pixels, labels, seed=seed, batch=BATCH, device=device)
    wanted = torch_denoiser(spec.model, BATCH, device)(probe)

    def judge(quantised: Generator, activations: bool) -> Mapping[str, Any]:
        assert quantised.denoise is not None
        if activations:
            player = torch_player(quantised)
            feeds = step_feeds_of(quantised, player, quantised.tables)
            found = plan_denoiser(player, quantised.denoise, feeds)(probe)
        else:
            found = torch_denoiser(quantised.denoise.model, BATCH, device)(probe)
        figures = output_quality(probe, wanted, found).to_json() | {"source": source, "seed": seed}
        return figures | {PER_IMAGE: _output_by_image(probe.noise, wanted, found)} if per_image else figures

    return judge


def _output_by_image(noise: np.ndarray, wanted: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """The terms of `output_quality` for each image, (n,) float64, from outputs (n, C, H, W)."""

    def squares(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        return ((a.astype(np.float64) - b) ** 2).reshape(len(a), -1)

    return {
        "output_error": squares(found, wanted).sum(axis=1),
        "output_power": squares(wanted, 0.0).sum(axis=1),
        "loss": squares(found, noise).mean(axis=1),
        "loss_fp": squares(wanted, noise).mean(axis=1),
    }
