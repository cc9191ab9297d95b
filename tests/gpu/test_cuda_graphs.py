"""Recorded graphs draw what ordinary runs draw, for every batch size, again and again."""

from __future__ import annotations

import numpy as np
import pytest

from qexport.lower import lower
from qexport.pipeline import quantize
from qexport.request import Request
from qexport.runtime import load
from qexport.scheme import preset
from qexport.targets.ort_cuda import device_count

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(device_count() == 0, reason="no GPU")]


@pytest.mark.parametrize("model", ["var-c10-d2", "dit-c10-d2"])
def test_replayed_images_are_those_of_ordinary_runs(model: str, tmp_path) -> None:
    folder = tmp_path / model
    quantize(model, request=Request(preset(4)), out=folder)
    lower(folder, "ort-cuda")
    plain = load(folder, provider="cuda", target="ort-cuda")
    recorded = load(folder, provider="cuda", target="ort-cuda", cuda_graphs=True)
    assert recorded.uncaptured == ()
    for seed in range(4):  # the first learns shapes, the next two record, then it is all replay
        for labels in ([1, 7], [3]):
            want = plain.generate(labels, seed=seed, batch=2)
            np.testing.assert_array_equal(recorded.generate(labels, seed=seed, batch=2), want)
