"""What guidance and filters make of the same rounding: settings of the sampler, one by one, on the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qexport.family import Generator
from qexport.reference import torch_player
from qexport.scaling.analysis.flips import flips
from qexport.verify.denoise_quality import play_trajectories, trajectory_quality
from qexport.verify.fd import measure_fd
from qexport.verify.trajectory import label_inputs, labels_for

BATCH = 50
TOKEN_SETTINGS: tuple[Mapping[str, float], ...] = (
    {"cfg": 0.0, "top_k": 0, "top_p": 0.0},
    {"cfg": 1.0, "top_k": 0, "top_p": 0.0},
    {"cfg": 2.0, "top_k": 0, "top_p": 0.0},
    {"cfg": 2.0, "top_k": 900, "top_p": 0.0},
    {"cfg": 2.0, "top_k": 900, "top_p": 0.96},
    {"cfg": 2.0, "top_k": 1, "top_p": 0.0},
)
"""Guidance alone, then the filters one by one; the last is greedy: a token flips only if the best one changes."""

DENOISER_SETTINGS: tuple[Mapping[str, float], ...] = ({"cfg": 1.0}, {"cfg": 1.5}, {"cfg": 2.0}, {"cfg": 4.0})


def settings_of(generator: Generator) -> tuple[Mapping[str, float], ...]:
    """Those of the settings that the plan takes."""
    settings = TOKEN_SETTINGS if generator.draw is not None else DENOISER_SETTINGS
    known = {given.name for given in generator.plan.inputs}
    return tuple(each for each in settings if set(each) <= known)


def moderated(
    full: Generator, quantised: Generator, settings: Mapping[str, float], *, samples: int, images: int, seed: int = 0
) -> dict[str, Any]:
    """One setting: KL and flips, or the error of trajectories, on `samples`; FD of `images` of the quantised model."""
    found: dict[str, Any] = {"settings": dict(settings), "n": samples}
    if full.draw is not None:
        summary = flips(full, quantised, samples=samples, seed=seed, inputs=settings).overall()
        found |= {name: summary[name] for name in ("kl", "flip", "hard")}
    elif full.denoise is not None and quantised.denoise is not None:
        labels = labels_for(samples, full.entry.num_classes)
        ends = [
            play_trajectories(torch_player(model), spec, labels, seed=seed, inputs=settings)
            for model, spec in ((full, full.denoise), (quantised, quantised.denoise))
        ]
        found["trajectory_error"] = trajectory_quality(*ends).trajectory_error
    if images:
        found["fd"] = frechet(quantised, settings, images, seed)
    return found


def frechet(generator: Generator, settings: Mapping[str, float], images: int, seed: int = 0) -> dict[str, Any] | None:
    """FD of images that the model samples; None where it has no features."""
    if generator.features is None:
        return None
    player, labels = torch_player(generator), labels_for(images, generator.entry.num_classes)
    batches = (
        player.play({**settings, **label_inputs(generator.plan, labels[i : i + BATCH])}, seed=seed, first_index=i)
        for i in range(0, images, BATCH)
    )
    return measure_fd(batches, generator.features, seed).to_json()
