"""Calibrated on images, layers see what teacher forcing shows them (tokens), or latents noised by the book (DiT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_llamagen, tiny_shared_aln
from torch import Tensor

from qexport.calibrate import Replay, record, require_encoder
from qexport.errors import InputError
from qexport.family import Generator
from qexport.pipeline import load_generator
from qexport.recipe import Calibration, CalibrationImages
from qexport.reference import Interception, Window, layer_weights

SAME = 1e-5
"""Relative L2 between one pass over all tokens and one a scale: another order of the same float32 sums."""

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, tuple[Callable[[], Generator], int, str]] = {
    "var-c10-d2": (lambda: load_generator("var-c10-d2"), 32, "blocks.1.ffn.fc1"),
    "var-shared": (tiny_shared_aln, 6, "blocks.1.ffn.fc1"),
    "llamagen-tiny": (tiny_llamagen, 8, "layers.1.feed_forward.w1"),
}


def given(count: int, side: int) -> CalibrationImages:
    pixels = np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64)[::-1] % 10
    return CalibrationImages("mine", load=lambda first, last: (pixels[first:last], labels[first:last]))


def _pixels(images: CalibrationImages, count: int) -> tuple[Tensor, Tensor]:
    assert images.load is not None
    pixels, labels = images.load(0, count)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255, torch.from_numpy(labels.copy())


@pytest.mark.parametrize("model", CASES)
def test_tokens_of_images_are_forced(model: str) -> None:
    build, side, layer = CASES[model]
    generator, count = build(), 3
    assert generator.quality is not None
    assert generator.draw is not None
    images = given(count, side)
    layer = layer if layer in generator.layers else next(name for name in generator.layers if name.endswith("w1"))
    weight, seen = layer_weights(generator)[layer], list[Tensor]()

    def visit(name: str, x: Tensor, *rest: Window | int | None) -> Tensor:
        seen.append(x.clone())
        return x

    pixels, labels = _pixels(images, count)
    with torch.no_grad(), Interception({layer: weight}, visit):
        generator.quality.teacher_forced_logits(labels, generator.quality.tokenize(pixels))
    want = torch.cat(seen)  # (B, L, width)
    seen.clear()
    trajectories = record(generator, Calibration(count, 5, images=images), [generator.draw.graph])
    replay = Replay(generator, generator.draw.graph, trajectories)
    while layer not in [name for name in generator.layers if generator.layers[name][1] in replay.stage.parameters]:
        replay.advance()
    replay.run({layer: weight}, visit)
    got = torch.cat(seen, dim=1)  # both branches, one call after another
    assert got.shape == (2 * count, *want.shape[1:])
    assert float((got[:count] - want).norm() / want.norm()) < SAME
    assert float((got[count:] - want).norm() / want.norm()) > 1e-3  # the other branch sees no class


def test_latents_of_images_are_noised_over_the_schedule() -> None:
    generator, count = load_generator("dit-c10-d2"), 5
    assert generator.denoise is not None
    images = given(count, 32)
    (trajectory,) = record(generator, Calibration(count, 2, "ddim-10", images), ["denoise", "decode"])
    *calls, decode = trajectory
    pixels, labels = _pixels(images, count)
    latents = generator.denoise.model.encode(pixels)
    assert torch.equal(decode.feeds["x"], latents)
    timesteps = [int(call.feeds["row"].flatten()[column(generator, labels)]) for call in calls]
    assert len(timesteps) == 10
    assert timesteps == sorted(timesteps, reverse=True)
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # DDPM's own, arXiv:2006.11239
    noises = []
    for t, call in zip(timesteps[1:], calls[1:], strict=True):
        assert torch.equal(call.feeds["label"], labels)
        noises.append((call.feeds["x"] - np.sqrt(alphas[t]) * latents) / np.sqrt(1 - alphas[t]))
    numbers = torch.stack(noises).double()
    assert abs(float(numbers.mean())) < 0.03
    assert abs(float(numbers.std()) - 1) < 0.03
    assert abs(float((numbers[0] * numbers[1]).mean())) < 0.05  # not the same noise again
    assert abs(float((numbers[:, 0] * numbers[:, 1]).mean())) < 0.05
    assert {call.step for call in calls} == set(range(10))


def column(generator: Generator, labels: Tensor) -> int:
    """Where a row has its timestep, by feeding two."""
    assert generator.denoise is not None
    rows = [
        np.asarray(generator.denoise.model.graph_inputs(np.zeros((5, 4, 16, 16), np.float32), t, labels.numpy())["row"])
        for t in (3, 8)
    ]
    (place,) = np.flatnonzero(rows[0] != rows[1])
    return int(place)


def test_what_images_are_fed_depends_on_image_and_seed_alone() -> None:
    """Not on the batch: 20 images are 16 and 4."""
    generator = load_generator("dit-c10-d2")
    feeds = [
        [call.feeds["x"] for call in record(generator, Calibration(20, seed, "ddim-10", given(20, 32)), ["denoise"])[1]]
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(feeds[0], feeds[1], strict=True))
    assert not torch.equal(feeds[0][3], feeds[2][3])


def test_models_without_an_encoder_and_images_that_nobody_gave_are_one_line() -> None:
    generator = load_generator("var-c10-d2")
    with pytest.raises(InputError, match="the family offers no encoder, so it cannot be calibrated on images"):
        require_encoder(replace(generator, quality=None))
    with pytest.raises(InputError, match="needs the images of 'mine'; say where they are by --calibration-data"):
        record(generator, Calibration(2, images=CalibrationImages("mine")), ["step"])
