"""torch as a contender: the same images as the reference, also where results come in float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qexport.bench.torch_player import DeviceBackend, play_in_torch
from qexport.pipeline import load_generator
from qexport.reference import torch_player


@pytest.fixture(scope="module")
def generator():
    return load_generator("var-c10-d2")


def test_eager_torch_draws_what_the_reference_draws(generator):
    want = torch_player(generator).play({"label": [1, 7]}, seed=3)
    np.testing.assert_array_equal(play_in_torch(generator, "cpu").play({"label": [1, 7]}, seed=3), want)


def test_float16_comes_back_as_float32(generator):
    backend = DeviceBackend(generator, compiled=False)
    got = backend.get(torch.tensor([0.5, 1.5], dtype=torch.float16))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [0.5, 1.5])
    assert backend.get(torch.tensor([3])).dtype == np.int64
