"""FeatureNet against features and logits that an independent implementation computed from the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from qexport_models.checkpoints import BUNDLED, read_state
from qexport_models.featurenet import STATISTICS, WEIGHTS, Cifar10Features, FeatureNet, load_featurenet
from qexport_models.strict_load import build_strict
from safetensors.torch import load_file

from qexport.errors import CheckpointError
from qexport.numerics.metrics import frechet_distance, relative_l2

EXPECTED = Path(__file__).parents[1] / "fixtures" / "zoo-expected-featurenet.safetensors"
RELATIVE_L2 = 2e-6


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(EXPECTED)


def test_features_and_logits(expected: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        features, logits = load_featurenet()(expected["images_u8"].float() / 127.5 - 1)
    assert relative_l2(features, expected["featurenet.features"]) <= RELATIVE_L2
    assert relative_l2(logits, expected["featurenet.logits"]) <= RELATIVE_L2


def test_extractor_takes_images_from_0_to_1(expected: dict[str, torch.Tensor]) -> None:
    found = Cifar10Features().features(expected["images_u8"].float() / 255)
    assert relative_l2(found, expected["featurenet.features"]) <= RELATIVE_L2


def test_statistics_are_those_of_the_training_images() -> None:
    extractor = Cifar10Features()
    assert extractor.mu.shape == (256,)
    assert extractor.cov.dtype == np.float64
    with np.load(BUNDLED / STATISTICS) as file:
        test = frechet_distance(file["test_mu"], file["test_cov"], extractor.mu, extractor.cov)
    assert test == pytest.approx(0.065, abs=5e-4), "real test against real training images, as the zoo states it"


def test_it_is_never_called_fid() -> None:
    assert "FID" not in Cifar10Features().name


def test_loads_strictly() -> None:
    state = read_state(BUNDLED / WEIGHTS)
    state.pop("fc.bias")
    with pytest.raises(CheckpointError, match=r"missing: fc\.bias"):
        build_strict(FeatureNet, state, "FeatureNet")
