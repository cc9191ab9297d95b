"""One run measured for real, against figures that are computed apart."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from qexport.family import INCEPTION
from qexport.pipeline import load_generator
from qexport.quantize import apply_stored, stored_weights
from qexport.recipe import recipe_for
from qexport.reference import torch_player
from qexport.scaling.cost import count_macs
from qexport.scaling.grid import Measurement, Run
from qexport.scaling.measure import Bench, Files
from qexport.scheme import preset
from qexport.verify import inception_run
from qexport.verify.denoise_quality import compare_trajectories
from qexport.verify.trajectory import labels_for

HOW = Measurement(drawn=4, trajectories=2, fd=0, topkld_steps=2, topkld_samples=66)


@pytest.fixture(scope="module")
def var():
    return Bench("var-c10-d2", HOW, Files())


@pytest.fixture(scope="module")
def dit():
    return Bench("dit-c10-d2", HOW, Files())


def rounded(model, bits):
    full = load_generator(model)
    quantised = copy.deepcopy(full)
    apply_stored(quantised, stored_weights(full, recipe_for(preset(bits), full.default_layers, "r")))
    return full, quantised


def test_a_model_that_draws_tokens(var):
    found = var.run(Run("var-c10-d2", "int3", "rtn"), None)
    _, quantised = rounded("var-c10-d2", 3)
    judged = var.judge(quantised, False)
    assert found.figures["kl"]["value"] == pytest.approx(judged["kl"], rel=1e-12)
    assert found.figures["kl"]["n"] == 4
    assert found.figures["top1_agreement"]["value"] == pytest.approx(judged["top1_agreement"], rel=1e-12)
    # On samples of the model itself, cross-entropy is its entropy there and KL on the average of draws.
    gap = found.figures["cross_entropy_drawn"]["value"] - found.per_image["cross_entropy_fp"].mean()
    assert gap == pytest.approx(found.figures["kl"]["value"], rel=0.5)
    assert "cross_entropy" not in found.figures


def test_a_denoiser(dit):
    found = dit.run(Run("dit-c10-d2", "int2", "rtn"), None)
    full, quantised = rounded("dit-c10-d2", 2)
    assert found.figures["output_mse"]["value"] == pytest.approx(dit.judge(quantised, False)["output_mse"], rel=1e-6)
    assert full.denoise is not None
    wanted, _, _ = compare_trajectories(
        torch_player(full), torch_player(quantised), full.denoise, labels_for(2, 10), seed=0
    )
    assert found.figures["trajectory_error"]["value"] == pytest.approx(wanted.trajectory_error, rel=1e-6)


def test_full_precision_loses_only_what_fp16_does(var, dit):
    for bench, name in ((var, "kl"), (dit, "output_mse")):
        found = bench.run(Run(bench.plain.entry.name), None)
        assert 0 <= found.figures[name]["value"] < 1e-6
        assert found.cost["bits_per_weight"] == 16


def test_bits_are_counted_by_hand(var):
    """d2: 2 blocks of 64·2 = 128 channels; qkv 3, proj 1, fc 4 + 4 and ada_lin 6 times 128² weights."""
    weights = 2 * (3 + 1 + 8 + 6) * 128**2
    cost = var.run(Run("var-c10-d2", "int3", "rtn"), None).cost
    full = var.run(Run("var-c10-d2"), None).cost
    assert cost["matrix_weights"] == weights
    assert cost["matrix_bits"] == weights * (3 + 16 / 32)
    assert full["matrix_bits"] == weights * 16
    assert full["total_bits"] - cost["total_bits"] == weights * (16 - 3.5)
    assert full["stored_bits"] - cost["stored_bits"] == weights * (16 - 4.5)  # int3 lies in int4
    assert full["total_bits_with_decoder"] - cost["total_bits_with_decoder"] == weights * (16 - 3.5)
    assert full["compute_bits"] == 16 * full["macs"]


def test_products_are_counted_by_hand(var):
    """155 tokens go through each block, twice for guidance; the modulation sees one row a scale and class."""
    macs = count_macs(var.plain)
    tokens, scales, width = 155, 7, 128
    assert macs["blocks.0.ffn.fc1"] == 2 * tokens * width * 4 * width
    assert macs["head"] == 2 * tokens * width * 4096
    assert macs["blocks.1.ada_lin.1"] % (6 * width * width) == 0
    assert macs["blocks.1.ada_lin.1"] <= 2 * scales * 6 * width * width


def test_inception_takes_the_place_of_the_models_features(var, monkeypatch):
    """The features that were given are asked, of images as large as the model's; they name the figure."""

    class Means:
        name, mu, cov = INCEPTION, np.zeros(3), np.eye(3)

        def features(self, images):
            return images.mean(dim=(2, 3))

    def opening(weights, reference, size):
        assert (str(weights), [str(path) for path in reference], size) == ("w.pth", ["r.npz"], (32, 32))
        return Means()

    monkeypatch.setattr(inception_run, "open_extractor", opening)
    given = Bench("var-c10-d2", replace(HOW, fd=4), Files(inception="w.pth", reference=("r.npz",)))
    found = given.frechet(given.plain)
    assert (found["label"], found["n"]) == ("FID", 4)
    own = Bench("var-c10-d2", replace(HOW, fd=4), Files()).frechet(given.plain)
    assert own["label"].startswith("FD (")
    assert own["value"] != pytest.approx(found["value"], rel=1e-3)


@pytest.mark.slow
def test_fine_tuning_is_better_than_its_start_on_what_it_is_judged_by(var, tmp_path):
    found = var.run(Run("var-c10-d2", "int2", "topkld"), tmp_path / "work")
    training = found.settings["training"]
    assert training["start_method"] == "gptq"
    assert training["steps"] == 2
    assert (training["settings"]["samples"], training["settings"]["batch"]) == (66, 8)
    assert training["settings"]["lr"] is None
    assert 0.005 < training["rates"]["lr"] < 0.01  # 0.017 of what 2 bits change
    assert training["best"] <= training["start"]
    assert list((tmp_path / "work").iterdir())  # where a run that is cut off goes on


def test_fd_is_that_of_verify(var):
    from qexport.verify.fd import measure_fd

    bench = Bench("var-c10-d2", Measurement(drawn=1, fd=12), Files())
    found = bench.frechet(bench.plain)
    assert bench.plain.features is not None
    labels = np.arange(12) % 10
    images = torch_player(bench.plain).play({"label": labels}, seed=0)
    assert found["value"] == pytest.approx(measure_fd([images], bench.plain.features, 0).value, rel=1e-4)
    assert found["n"] == 12
