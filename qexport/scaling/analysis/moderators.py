"""What guidance and filters make of the same rounding: settings of the sampler, one by one, on the same noise.

Labels and noise are the same at every setting, so that a figure's change from the first one is resampled image by
image. Intervals of FD come without their resamples: its differences are treated as those of independent figures, whose
half-widths add up as √(a² + b²). Images of the same noise tend to move together, which makes these rather too wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from qexport.family import Generator
from qexport.reference import torch_player
from qexport.scaling.analysis.flips import flips
from qexport.scaling.analysis.resampled import Resampled, estimate, relative_l2, squares, to_json
from qexport.verify.denoise_quality import play_trajectories
from qexport.verify.fd import FrechetResult, measure_fd
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


def moderator_rows(
    full: Generator, versions: Mapping[str, Generator], *, samples: int, images: int, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One row a setting, plain data: the figures of each quantised version on `samples` trajectories, and FD.

    `change` is a figure minus that at the first setting; `fd` is of `images` images, left out where that is 0,
    `fd_over_full` is the FD minus full precision's at the same setting, `fd_change` minus its own at the first one.
    """
    first: dict[str, dict[str, Resampled]] = {}
    first_fd: dict[str, FrechetResult] = {}
    for settings in settings_of(full):
        row: dict[str, Any] = {"settings": dict(settings)}
        full_fd = frechet(full, settings, images, seed) if images else None
        if full_fd is not None:
            row["fd_fp"] = full_fd.to_json()
            row["fd_fp_change"] = fd_difference(full_fd, first_fd.setdefault("fp", full_fd))
        for name, version in versions.items():
            figures = moderated(full, version, settings, samples=samples, seed=seed)
            own = first.setdefault(name, figures)
            change = {each: figure - own[each] for each, figure in figures.items()}
            row[name] = {"n": samples, **to_json(figures), "change": to_json(change)}
            fd = frechet(version, settings, images, seed) if images else None
            if fd is not None and full_fd is not None:
                row[name]["fd"] = fd.to_json()
                row[name]["fd_over_full"] = fd_difference(fd, full_fd)
                row[name]["fd_change"] = fd_difference(fd, first_fd.setdefault(name, fd))
        yield row


def moderated(
    full: Generator, quantised: Generator, settings: Mapping[str, float], *, samples: int, seed: int = 0
) -> dict[str, Resampled]:
    """One setting, on `samples` trajectories: KL and flips of a model that draws, or the error of the final latents."""
    if full.draw is not None:
        summary = flips(full, quantised, samples=samples, seed=seed, inputs=settings).overall()
        return {name: summary[name] for name in ("kl", "flip", "hard")}
    assert full.denoise is not None
    assert quantised.denoise is not None
    labels = labels_for(samples, full.entry.num_classes)
    wanted, found = (
        play_trajectories(torch_player(model), spec, labels, seed=seed, inputs=settings).states[-1]
        for model, spec in ((full, full.denoise), (quantised, quantised.denoise))
    )
    return {"trajectory_error": estimate(relative_l2, *squares(found, wanted, samples))}


def fd_difference(one: FrechetResult, other: FrechetResult) -> dict[str, Any]:
    """``value`` of one − other, and ``ci95``; see the module."""
    if one is other:
        return {"value": 0.0, "ci95": [0.0, 0.0], "n": one.images}
    value = one.value - other.value
    half = math.hypot(one.high - one.value, other.high - other.value)
    return {"value": value, "ci95": [value - half, value + half], "n": one.images}


def frechet(generator: Generator, settings: Mapping[str, float], images: int, seed: int = 0) -> FrechetResult | None:
    """FD of images that the model samples; None where it has no features."""
    if generator.features is None:
        return None
    player, labels = torch_player(generator), labels_for(images, generator.entry.num_classes)
    batches = (
        player.play({**settings, **label_inputs(generator.plan, labels[i : i + BATCH])}, seed=seed, first_index=i)
        for i in range(0, images, BATCH)
    )
    return measure_fd(batches, generator.features, seed)
