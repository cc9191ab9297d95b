"""LlamaGen's tokeniser against the original's outputs, and its published layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from qexport_models.llamagen.config import VQ_CONFIGS, VQConfig
from qexport_models.llamagen.decode import Decode
from qexport_models.llamagen.vq import VQ
from support import published_lists, tensors

CONFIG = VQConfig(ch_mult=(1, 2), codes=64, z_channels=32, ch=32)
SIDE = 4
LIMIT = 2e-5  # as for logits


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    return tensors("llamagen-vq-tiny-shared")


def build(data: dict[str, torch.Tensor]) -> VQ:
    vq = VQ(CONFIG).eval().requires_grad_(False)
    vq.load_state_dict({key[3:]: value.float() for key, value in data.items() if key.startswith("sd.")}, strict=True)
    return vq


@pytest.fixture(scope="module")
def vq(data: dict[str, torch.Tensor]) -> VQ:
    return build(data)


def relative_l2(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_codes_are_normalised(vq: VQ, data: dict[str, torch.Tensor]) -> None:
    codes = vq.quantize.look_up(data["in.code"])
    assert relative_l2(codes.unflatten(-1, (SIDE, SIDE)), data["out.codebook_entry"]) <= LIMIT
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(2, SIDE * SIDE))


def test_encoder(vq: VQ, data: dict[str, torch.Tensor]) -> None:
    assert relative_l2(vq.quant_conv(vq.encoder(data["in.img"])), data["out.enc_h"]) <= LIMIT
    assert torch.equal(vq.encode((data["in.img"] + 1) / 2).flatten(), data["out.indices"])


def test_decoder(vq: VQ, data: dict[str, torch.Tensor]) -> None:
    decode = Decode(vq, SIDE)
    raw = decode.raw(data["in.code"])
    assert relative_l2(raw, data["out.decode_code"]) <= LIMIT
    tokens = data["out.indices"].unflatten(0, (2, -1))
    assert relative_l2(decode.raw(tokens), data["out.recon"]) <= LIMIT
    expected = np.clip((data["out.decode_code"].numpy() + 1) / 2, 0, 1)
    np.testing.assert_allclose(decode(data["in.code"])[0].numpy(), expected, atol=1e-4)


def _raw_codebook(vq: VQ) -> None:
    vq.quantize.look_up = lambda tokens_BN: vq.quantize.embedding(tokens_BN).transpose(1, 2)


def _skip_attention(vq: VQ) -> None:
    vq.decoder.mid[1] = torch.nn.Identity()


def _swap_keys_and_values(vq: VQ) -> None:
    attention: Any = vq.decoder.mid[1]
    attention.k, attention.v = attention.v, attention.k


def _double_one_scale(vq: VQ) -> None:
    # conv2, not conv1: the norm after conv1 has one channel a group here and would undo it.
    vq.get_parameter("decoder.conv_blocks.1.res.0.conv2.weight")[0] *= 2


@pytest.mark.parametrize(
    "mutate", [_raw_codebook, _skip_attention, _swap_keys_and_values, _double_one_scale], ids=lambda f: f.__name__
)
def test_mutations_fail(data: dict[str, torch.Tensor], mutate: Callable[[VQ], None]) -> None:
    vq = build(data)
    mutate(vq)
    assert relative_l2(Decode(vq, SIDE).raw(data["in.code"]), data["out.decode_code"]) > LIMIT


@pytest.mark.parametrize(("name", "key"), [("vq-16", "VQ-16"), ("vq-8", "VQ-8")])
def test_published_layouts_load_strictly(name: str, key: str) -> None:
    expected = published_lists("llamagen")[key]
    with torch.device("meta"):
        vq = VQ(VQ_CONFIGS[name])
        vq.load_state_dict({key: torch.empty(shape) for key, shape in expected["shapes"].items()}, strict=True)
    assert sum(parameter.numel() for parameter in vq.parameters()) == expected["parameters"]
