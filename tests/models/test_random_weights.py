"""Random weights: reproducible, of sensible size, and marked as what they are."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from qexport_models.random_weights import Fan, Normal, build_random
from torch import nn

from qexport.errors import InputError
from qexport.family import load_random, random_seed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 64)
        self.norm = nn.LayerNorm(64)
        self.fc = nn.Linear(64, 256)
        self.conv = nn.Conv2d(16, 32, 3)
        self.special = nn.Parameter(torch.zeros(4000))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def test_numbers_are_those_of_the_stated_generator():
    net = build_random(Net, 7, "model.", [("^special$", Normal(0.5, 3.0))])
    key = hashlib.sha256(b"7/model.special").digest()[:16]
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    expected = draw.standard_normal(4000, dtype=np.float32) * np.float32(0.5) + np.float32(3)
    assert np.array_equal(net.special.numpy(), expected)
    again = build_random(Net, 7, "model.", [("^special$", Normal(0.5, 3.0))])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    for seed, prefix in ((8, "model."), (7, "vae.")):
        assert not torch.equal(build_random(Net, seed, prefix).fc.weight, net.fc.weight)


def test_each_kind_has_its_scale():
    net = build_random(Net, 0, "")
    for tensor, mean, std in (
        (net.embed.weight, 0, 0.02),
        (net.fc.weight, 0, 64**-0.5),
        (net.conv.weight, 0, 144**-0.5),
        (net.special, 0, 0.02),
        (net.fc.bias, 0, 0.02),
        (net.norm.weight, 1, 0.02),
    ):
        tolerance = 5 * std / tensor.numel() ** 0.5  # five standard errors of a mean
        assert abs(float(tensor.mean()) - mean) < tolerance
        assert abs(float(tensor.std()) / std - 1) < 5 / (2 * tensor.numel()) ** 0.5
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    assert net.mask.tolist() == [0, -np.inf]
    assert not net.training
    assert build_random(Net, 0, "", [("fc", Fan(3.0))]).fc.weight.std() > 0.3


def test_torch_still_draws_afterwards():
    assert float(nn.Linear(4, 4).weight.detach().abs().sum()) > 0


@pytest.mark.parametrize("name", ["var-c10-d2", "var-c10-d2-random"])
def test_var_is_finite_spread_and_marked(name):
    generator = load_random(name, 3)
    assert generator.entry.name == "var-c10-d2-random"
    assert generator.entry.source == "random weights, seed 3: not a model"
    assert random_seed(generator.entry.source) == 3
    assert generator.checkpoint_sha256 == {}
    assert generator.quality is not None
    tokens = generator.quality.tokenize(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    logits = generator.quality.teacher_forced_logits(torch.tensor([1, 8]), tokens)
    assert torch.isfinite(logits).all()
    assert 1 < float(logits.std()) < 6
    assert float((logits[0, 0] - logits[1, 0]).std()) > 0.5, "the class must matter"


def test_seed_of_a_source():
    for text in ("Hugging Face FoundationVision/var", "random weights, seed x: not a model", "random weights, seed 3"):
        assert random_seed(text) is None


def test_wrong_use():
    with pytest.raises(InputError, match="0 or greater"):
        load_random("var-c10-d2", -1)
    with pytest.raises(InputError, match="unknown model"):
        load_random("var-c11-d2", 0)
