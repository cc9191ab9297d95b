"""A model family from a distribution of its own: found by its entry point, quantised, played."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qexport.checkpoint import open_checkpoint
from qexport.errors import CheckpointError
from qexport.family import families, find_model, load_random, recognise
from qexport.pipeline import export, quantize
from qexport.quantize import apply_stored, stored_weights
from qexport.recipe import recipe_for
from qexport.runtime import load
from qexport.scheme import preset

PARITY = 1e-5
"""One float32 MLP against another through a sigmoid: a few dozen roundings of 6e-8."""


def test_family_is_found_and_recognised(installed, ink_file):
    assert "ink" in [family.name for family in families()]
    family, entry = find_model("ink-8")
    assert family is installed.FAMILY
    assert recognise(open_checkpoint(ink_file).shapes) == entry


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_and_play(installed, ink_file, tmp_path, bits):
    scheme = preset(bits)
    bundle = quantize("ink-8", scheme=scheme, checkpoint=str(ink_file), out=tmp_path / "bundle")
    assert bundle.manifest.model.name == "ink-8"
    assert bundle.manifest.totals["layers_quantized"] == 4
    labels = np.arange(installed.CLASSES)
    images = load(bundle.path, provider="cpu", options="exact").generate(labels, seed=5)

    family, entry = find_model("ink-8")
    generator = family.load(entry, str(ink_file), None)
    noise = [np.random.Generator(np.random.Philox(key=np.array([5, i], dtype=np.uint64))) for i in labels]
    z_BZ = torch.from_numpy(np.stack([one.standard_normal(installed.NOISE, dtype=np.float32) for one in noise]))
    painted = generator.graphs[0].module
    with torch.no_grad():
        full = painted(torch.from_numpy(labels), z_BZ)[0].numpy()
        apply_stored(generator, stored_weights(generator, recipe_for(scheme, generator.default_layers, scheme.name)))
        expected = painted(torch.from_numpy(labels), z_BZ)[0].numpy()
    assert np.abs(images - expected).max() < PARITY
    assert np.abs(images - full).max() > PARITY, "quantisation must show, or nothing was quantised"


def test_random_weights_are_marked_in_the_manifest(installed, tmp_path):
    generator = load_random("ink-8", 0)
    scheme = preset(4)
    recipe = recipe_for(scheme, generator.default_layers, scheme.name)
    bundle = export(generator, recipe, tmp_path / "bundle", progress=lambda stage, done, total: None)
    assert bundle.manifest.model.name == "ink-8-random"
    assert bundle.manifest.model.source == "random weights, seed 0: not a model"
    assert load(bundle.path, provider="cpu").generate([0, 1]).shape == (2, 3, 8, 8)


def test_messages_reach_the_user(installed, tmp_path):
    with pytest.raises(CheckpointError, match="pass --checkpoint FILE"):
        quantize("ink-8", out=tmp_path / "bundle")
    save_file({"stem.weight": torch.ones(2, 2)}, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=r"not ink-8 \(wrong\.safetensors\); missing: classes\.weight"):
        quantize("ink-8", checkpoint=str(tmp_path / "wrong.safetensors"), out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
