"""Samples: the tokens that verify draws too, latents of the very trajectories, batches that follow from the seed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from qexport.distill import Samples, drawn_latents, drawn_tokens, image_tokens
from qexport.distill.data import with_null_labels
from qexport.errors import InputError
from qexport.family import Generator
from qexport.reference import torch_player
from qexport.reference.timestep import timestep_place
from qexport.verify.quality import drawn_by


def test_tokens_are_those_that_verify_draws(tiny: Generator) -> None:
    """Two roads: the whole plan, decoder included, in batches of 5; and the drawing calls alone, in batches of 32."""
    found = drawn_tokens(tiny, 40, seed=3)
    batches = list(drawn_by(tiny, 40, 3, 5))
    np.testing.assert_array_equal(found.tensors[0].numpy(), np.concatenate([labels for labels, _ in batches]))
    np.testing.assert_array_equal(found.tensors[1].numpy(), np.concatenate([tokens for _, tokens in batches]))
    assert not torch.equal(found.tensors[1], drawn_tokens(tiny, 40, seed=4).tensors[1])


def test_latents_lie_on_the_teachers_trajectories(dit: Generator) -> None:
    """Every kept latent is bit for bit what the player feeds at that timestep, and all timesteps are met."""
    assert dit.denoise is not None
    samples = drawn_latents(dit, 60, seed=1, per_trajectory=10)
    noisy, t, labels = samples.tensors
    model = dit.denoise.model
    seen: dict[int, np.ndarray] = {}
    player = torch_player(dit)

    def keep(record) -> None:
        if record.graph == "denoise":
            seen[int(record.feeds["row"][timestep_place(model, first, classes)[1]])] = record.feeds["x"].numpy().copy()

    classes = np.arange(6) % 10
    first = np.zeros((6, 4, 16, 16), np.float32)
    player.play({"label": classes}, seed=1, observer=keep)
    for i in range(60):
        same = [n for n, trajectory in enumerate(seen[int(t[i])]) if np.array_equal(trajectory, noisy[i].numpy())]
        assert len(same) == 1
        assert int(labels[i]) == classes[same[0]]
    assert {int(number) // 100 for number in t} == set(range(10))
    assert len({(int(a), float(b.sum())) for a, b in zip(t, noisy, strict=True)}) == 60


def test_place_of_the_timestep(dit: Generator) -> None:
    assert dit.denoise is not None
    port, index = timestep_place(dit.denoise.model, np.zeros((1, 4, 16, 16), np.float32), np.array([0]))
    row = dit.denoise.model.graph_inputs(np.zeros((1, 4, 16, 16), np.float32), 617, np.array([0]))[port]
    assert row.reshape(-1)[index] == 617


def test_batches_follow_from_seed_and_step() -> None:
    samples = Samples((torch.arange(10), torch.arange(10) * 2), "numbers")
    batches = [samples.batch(step, 4, seed=0) for step in range(5)]
    flat = torch.cat([batch[0] for batch in batches]).tolist()
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))  # each pass meets every sample once
    assert flat[:10] != flat[10:]
    assert all(torch.equal(batch[1], batch[0] * 2) for batch in batches)
    assert torch.equal(samples.batch(3, 4, seed=0)[0], batches[3][0])
    assert not torch.equal(samples.batch(0, 10, seed=1)[0], samples.batch(0, 10, seed=0)[0])
    assert samples.batch(0, 25, seed=0)[0].shape == (25,)  # more than there are


def test_split_keeps_apart() -> None:
    samples = Samples((torch.arange(10),), "numbers")
    first, last = samples.split(3)
    assert first.tensors[0].tolist() == list(range(7))
    assert last.tensors[0].tolist() == [7, 8, 9]
    with pytest.raises(InputError, match="10 samples, 10 of them held out"):
        samples.split(10)


def test_null_labels_are_a_share_and_only_labels() -> None:
    samples = Samples((torch.zeros(2000, dtype=torch.int64), torch.arange(2000)), "numbers")
    found = with_null_labels(samples, 0, 10, 0.1, seed=0)
    share = (found.tensors[0] == 10).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5
    assert torch.equal(found.tensors[1], samples.tensors[1])


def test_tokens_of_images(tiny: Generator) -> None:
    pixels = np.random.default_rng(0).random((3, 3, 6, 6), np.float32)
    assert tiny.quality is not None
    found = image_tokens(tiny, iter([(pixels[:2], np.array([1, 2])), (pixels[2:], np.array([3]))]), "three")
    want = tiny.quality.tokenize(torch.from_numpy(pixels))
    assert torch.equal(found.tensors[1], want)
    assert found.tensors[0].tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="no images"):
        image_tokens(tiny, iter([]), "an empty folder")


def test_teacher_forcing_has_gradients_where_parameters_want_them(tiny: Generator, tiny_tokens: Samples) -> None:
    assert tiny.quality is not None
    assert not tiny.quality.teacher_forced_logits(*tiny_tokens.tensors).requires_grad
    model = copy.deepcopy(tiny.quality)
    model.var.head.weight.requires_grad_(True)  # type: ignore[attr-defined]
    found = model.teacher_forced_logits(*tiny_tokens.tensors)
    assert found.requires_grad
    assert torch.equal(found.detach(), tiny.quality.teacher_forced_logits(*tiny_tokens.tensors))


def test_models_of_the_other_kind_are_refused(tiny: Generator, dit: Generator) -> None:
    with pytest.raises(InputError, match="draws no tokens"):
        drawn_tokens(dit, 4, 0)
    with pytest.raises(InputError, match="does not denoise"):
        drawn_latents(tiny, 4, 0, 10)
    with pytest.raises(InputError, match="no tokens of images"):
        image_tokens(dit, iter([]), "x")
