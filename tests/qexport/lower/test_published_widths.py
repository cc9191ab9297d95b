"""Numbers of lowered graphs at the widths of published models: two blocks each of DiT-XL/2 and var-d16, random weights.

The small models have the same blocks, but sums of 1152 and 4608 terms round otherwise than sums of 128. Only the first
graph is compared, on its first calls; the decoder beside it is a small one. Both limits hold on ONNX Runtime's CPU
provider (1.31.1), at 16 and at 4 bits: 4.3e-7 and 6.8e-7 in float32 and 5.9e-4 and 6.2e-4 in float16 for DiT-XL/2,
4.3e-7 and 6.4e-7, 3.0e-4 and 4.7e-4 for var-d16. That provider computes in float32 between casts, so a GPU rounds more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from forced import Call, distances
from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.dit.family import RANDOM_DIT
from qexport_models.dit.family import assemble as assemble_dit
from qexport_models.dit.model import DiT
from qexport_models.random_weights import build_random
from qexport_models.var.family import RANDOM_VAR
from qexport_models.var.family import assemble as assemble_var
from qexport_models.var.model import VAR
from qexport_models.var.vqvae import VQVAE

import qexport.runtime as runtime
from qexport.export import export
from qexport.family import Generator, find_model
from qexport.lower import lower
from qexport.recipe import recipe_for
from qexport.runtime.player import CallRecord
from qexport.scheme import preset

FP32_LIMIT, HALF_LIMIT = 1e-6, 1e-3
"""Relative L2 of every real output of a call: what issue 6 asks for."""

CALLS = {"dit-xl-2-256": 1, "var-d16": 4}
"""A step of a denoiser; scales of 1 to 16 tokens, with and without a past."""

BEHIND_A_DRAW = ("next_f_hat", "next_map")
"""Outputs that jump where a token falls on the other side of a boundary."""


class _Enough(Exception):  # noqa: N818 - it is no error
    pass


@cache
def two_blocks(name: str) -> Generator:
    """The model with two of its blocks, and a decoder that takes no time to capture."""
    _, entry = find_model(name)
    config = entry.config
    if entry.family == "dit":
        dit = build_random(lambda: DiT(replace(config["dit"], depth=2)), 0, "model.", RANDOM_DIT)
        small = replace(config["vae"], block_out_channels=(32, 32, 32, 32), layers_per_block=1)
        return assemble_dit(entry, dit, build_random(lambda: AutoencoderKL(small), 0, "vae.", ()), {})
    var = build_random(lambda: VAR(replace(config["var"], depth=2)), 0, "model.", RANDOM_VAR)
    small = replace(config["vae"], ch=32, num_res_blocks=1)
    return assemble_var(entry, var, build_random(lambda: VQVAE(small), 0, "vae.", ()), {})


def first_calls(path: Path, count: int) -> list[Call]:
    """The first calls of a portable graph, for one image, and everything that came out of them."""
    loaded = runtime.load(path, provider="cpu", options="exact", threads=1)
    backend, calls = loaded.player.backend, []

    def observe(record: CallRecord) -> None:
        feeds, results = (
            {name: np.array(backend.get(value)) for name, value in values.items()}
            for values in (record.feeds, record.results)
        )
        calls.append(Call(record.graph, feeds, results))
        if len(calls) == count:
            raise _Enough

    outputs = {name: backend.outputs(name) for name in loaded.bundle.plan.graphs}
    with pytest.raises(_Enough):
        loaded.player.play({"label": np.array([207])}, seed=3, observer=observe, extra_outputs=outputs)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", list(CALLS))
def test_the_graphs_for_cuda_are_what_they_were(tmp_path, one_thread, name, bits):
    generator = two_blocks(name)
    recipe = recipe_for(preset(bits), generator.default_layers, f"w{bits}a16")
    path = export(generator, recipe, tmp_path / "bundle", progress=lambda stage, done, total: None).path
    calls = first_calls(path, CALLS[name])
    lower(path, "ort-cuda", dtype="float32")
    assert 0 < worst(path, calls) <= FP32_LIMIT  # not 0: the graphs do differ
    lower(path, "ort-cuda")
    assert FP32_LIMIT < worst(path, calls) <= HALF_LIMIT  # and the comparison sees as little as float16's rounding


def worst(path: Path, calls: list[Call]) -> float:
    """The greatest distance of any output, those left out that an unlike draw changes."""
    found = [(port, value) for call in distances(path, "ort-cuda", calls) for port, value in call.items()]
    return max(value for port, value in found if port not in BEHIND_A_DRAW)
