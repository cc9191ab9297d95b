"""VAR's VQVAE against the original, and its resizes against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qexport_models.strict_load import build_strict
from qexport_models.var.config import VQVAEConfig
from qexport_models.var.resize import area_down_1d, bicubic_up_1d, plane
from qexport_models.var.vqvae import VQVAE
from support import checkpoint, relative_l2, state_of, tensors

RELATIVE_L2 = 2e-5
TINY = VQVAEConfig(vocab_size=64, z_channels=16, ch=32, ch_mult=(1, 2), scales=(1, 2, 3, 4))
C10 = VQVAEConfig(vocab_size=4096, z_channels=32, ch=64, ch_mult=(1, 2, 2), scales=(1, 2, 3, 4, 5, 6, 8))


@torch.no_grad()
def test_tiny_vqvae_matches_the_original():
    fixture = tensors("var-vae-tiny-shared")
    vae = build_strict(lambda: VQVAE(TINY), state_of(fixture), "tiny")
    assert relative_l2(vae.encode(fixture["in.img"]), fixture["out.enc_f"]) <= RELATIVE_L2
    tokens = vae.tokenize(fixture["in.img"])
    for i, found in enumerate(tokens):
        assert torch.equal(found, fixture[f"out.idx.{i}"])
    f_hats = vae.quantize.f_hats(tokens)
    for i, f_hat in enumerate(f_hats):
        assert relative_l2(f_hat, fixture[f"out.embed_to_fhat.{i}"]) <= RELATIVE_L2
    assert relative_l2(f_hats[-1], fixture["out.fhat_last"]) <= RELATIVE_L2
    assert relative_l2(vae.quantize.teacher_forcing_input(tokens), fixture["out.idxBl_to_var_input"]) <= RELATIVE_L2
    assert relative_l2(vae.decode(f_hats[-1]), fixture["out.fhat_to_img"]) <= RELATIVE_L2
    assert relative_l2(vae.decode(f_hats[-1]), fixture["out.recon"]) <= RELATIVE_L2


@torch.no_grad()
def test_reference_vqvae_reconstructs_as_when_trained():
    expected = tensors("zoo-expected-var")
    vae = build_strict(lambda: VQVAE(C10), checkpoint("vqvae-c10"), "vqvae-c10")
    tokens = vae.tokenize(expected["images_u8"].float() / 127.5 - 1)
    assert torch.equal(torch.cat(tokens, dim=1), expected["vqvae.tokens"])
    got = vae.quantize.teacher_forcing_input(tokens)
    assert relative_l2(got, expected["vqvae.teacher_forcing_input"]) <= RELATIVE_L2
    image = vae.decode(vae.quantize.f_hats(tokens)[-1])
    assert relative_l2(image, expected["vqvae.reconstruction"]) <= RELATIVE_L2


@pytest.mark.parametrize(("source", "target"), [(1, 8), (2, 8), (3, 4), (5, 16), (13, 16), (8, 8), (24, 32)])
def test_bicubic_matrix_is_what_torch_interpolates(source, target):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, source, source))).float()
    want = F.interpolate(x, size=(target, target), mode="bicubic")
    got = (torch.from_numpy(plane(bicubic_up_1d(source, target))) @ x.flatten(2).transpose(1, 2)).transpose(1, 2)
    assert relative_l2(got.reshape(want.shape), want) < 1e-6


@pytest.mark.parametrize(("source", "target"), [(8, 1), (8, 3), (8, 5), (16, 13), (32, 24), (4, 4)])
def test_area_matrix_is_adaptive_average_pooling(source, target):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, source, source))).float()
    want = F.interpolate(x, size=(target, target), mode="area")
    got = (torch.from_numpy(plane(area_down_1d(source, target))) @ x.flatten(2).transpose(1, 2)).transpose(1, 2)
    assert relative_l2(got.reshape(want.shape), want) < 1e-6
