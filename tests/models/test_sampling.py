"""The sampler against the originals' masks, an independent float64 NumPy reference, exact probabilities, and ONNX."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from qexport_models.sampling import block_size, draw_tokens, filter_logits
from safetensors.torch import load_file
from scipy.stats import chisquare

FIXTURES = Path(__file__).parents[1] / "fixtures"
BOUNDARY = 2e-6
"""Of the total mass. Two running sums of ≤ 128 float32 terms: rounding adds up like √256 · 2⁻²⁴ = 1e-6; doubled."""
SETTINGS = [(0, 0.0, 1.0), (0, 1.0, 1.0), (1, 0.0, 1.0), (7, 0.0, 0.7), (0, 0.8, 1.0), (20, 0.9, 1.3), (999, 0.96, 1.0)]


def scalars(top_k: int, top_p: float, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(top_k), torch.tensor(top_p), torch.tensor(temperature)


def reference_masses(row: NDArray[np.float32], top_k: int, top_p: float, temperature: float) -> NDArray[np.float64]:
    """Probabilities after filtering, as VAR words it: ascending, remove what has cumulative mass ≤ 1 − top_p."""
    logits = row.astype(np.float64) / temperature
    order = np.argsort(logits, kind="stable")
    if top_k > 0:
        logits[order[: max(0, len(row) - top_k)]] = -np.inf
    mass = np.exp(logits - logits.max())
    mass /= mass.sum()
    if 0 < top_p < 1:
        remove = np.cumsum(mass[order]) <= 1 - top_p
        remove[-1] = False
        mass[order[remove]] = 0
        mass /= mass.sum()
    return mass


def random_case(vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, vocab_size, generator=generator) * 3
    uniform = torch.rand(3, 40, generator=generator)
    uniform[0, 0], uniform[0, 1] = 0.0, np.nextafter(np.float32(1), np.float32(0)).item()
    return logits, uniform


def wrong_draws(tokens: torch.Tensor, logits: torch.Tensor, uniform: torch.Tensor, *setting: float) -> int:
    """Draws that float64 does not confirm and that no boundary within `BOUNDARY` excuses."""
    wrong = 0
    rows = zip(tokens.flatten().tolist(), logits.flatten(0, 1).numpy(), uniform.flatten().tolist(), strict=True)
    for token, row, u in rows:
        mass = reference_masses(row, int(setting[0]), setting[1], setting[2])
        upper = np.cumsum(mass)
        inside = upper[token] - mass[token] - BOUNDARY <= u <= upper[token] + BOUNDARY
        wrong += not (mass[token] > 0 and inside)
    return wrong


@pytest.mark.parametrize(("vocab_size", "expected"), [(4096, 64), (16384, 128), (64, 8), (60, 6), (7, 1), (1, 1)])
def test_block_is_the_divisor_nearest_the_root(vocab_size: int, expected: int) -> None:
    assert block_size(vocab_size) == expected


@pytest.mark.parametrize("scale", range(4))
def test_masks_are_those_of_var(scale: int) -> None:
    data = load_file(FIXTURES / "var-tiny-shared.safetensors")
    guided, expected = data[f"topk.cfg_logits.{scale}"], data[f"topk.filtered_logits.{scale}"]
    torch.testing.assert_close(filter_logits(guided, *scalars(12, 0.9, 1.0)), expected, rtol=0, atol=0)


def test_masks_are_those_of_llamagen() -> None:
    data = load_file(FIXTURES / "llamagen-tiny-shared.safetensors")
    guided, expected = data["sampled.cfg_logits"], data["sampled.filtered_logits"]
    torch.testing.assert_close(filter_logits(guided, *scalars(20, 0.9, 1.0)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mutant", [(11, 0.9, 1.0), (12, 0.8, 1.0), (12, 0.9, 1.1), (0, 0.9, 1.0), (12, 0.0, 1.0)])
def test_wrong_settings_give_other_masks(mutant: tuple[int, float, float]) -> None:
    data = load_file(FIXTURES / "var-tiny-shared.safetensors")
    same = [
        torch.equal(filter_logits(data[f"topk.cfg_logits.{i}"], *scalars(*mutant)), data[f"topk.filtered_logits.{i}"])
        for i in range(4)
    ]
    assert not all(same)


@pytest.mark.parametrize("vocab_size", [64, 60, 53, 4096])
@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_agree_with_float64(vocab_size: int, setting: tuple[int, float, float]) -> None:
    logits, uniform = random_case(vocab_size)
    tokens = draw_tokens(logits, uniform, *scalars(*setting))
    assert tokens.dtype == torch.int64
    assert tokens.shape == uniform.shape
    assert wrong_draws(tokens, logits, uniform, *setting) == 0


def test_the_float64_check_sees_mistakes() -> None:
    logits, uniform = random_case(64)
    setting = (20, 0.9, 1.3)
    tokens = draw_tokens(logits, uniform, *scalars(*setting))
    assert wrong_draws((tokens + 1) % 64, logits, uniform, *setting) > 60
    assert wrong_draws(tokens, logits, 1 - uniform, *setting) > 60
    assert wrong_draws(tokens, logits, uniform, 20, 0.9, 1.0) > 5
    assert wrong_draws(tokens, logits, uniform, 20, 0.5, 1.3) > 5


def test_draws_follow_the_probabilities() -> None:
    """χ² of 200,000 draws against float64 probabilities; a temperature 5 % off is refused by the same test."""
    count, vocab_size = 200_000, 64
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(vocab_size, generator=generator)
    uniform = torch.rand(1, count, generator=generator)
    setting = (30, 0.95, 1.0)
    tokens = draw_tokens(row.expand(1, count, vocab_size), uniform, *scalars(*setting))
    seen = np.bincount(tokens.flatten().numpy(), minlength=vocab_size)

    mass = reference_masses(row.numpy(), *setting)
    assert seen[mass == 0].sum() == 0
    possible = mass > 0
    assert chisquare(seen[possible], mass[possible] * count).pvalue > 1e-3
    off = reference_masses(row.numpy(), 30, 0.95, 1.05)
    assert set(np.flatnonzero(off)) == set(np.flatnonzero(mass))
    assert chisquare(seen[possible], off[possible] * count).pvalue < 1e-3


def test_impossible_tokens_are_never_drawn() -> None:
    """Whole blocks without mass at both ends, and u at both ends of its range."""
    logits = torch.full((1, 2, 64), -1e4)  # exp underflows to 0
    logits[..., [19, 21, 40]] = torch.tensor([0.0, 1.0, 0.5])
    uniform = torch.tensor([[0.0, np.nextafter(np.float32(1), np.float32(0)).item()]])
    assert draw_tokens(logits, uniform, *scalars(0, 0.0, 1.0)).tolist() == [[19, 40]]


def test_draw_is_monotone_in_the_uniform() -> None:
    logits = random_case(64)[0][:1, :1].expand(1, 1000, 64)
    tokens = draw_tokens(logits, torch.linspace(0, 0.9999, 1000)[None], *scalars(0, 0.0, 1.0)).flatten().tolist()
    assert all(a <= b for a, b in pairwise(tokens))


def test_equal_logits_at_the_threshold_all_stay() -> None:
    logits = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0, 0.0]]])
    kept = torch.isfinite(filter_logits(logits, *scalars(2, 0.0, 1.0)))
    assert kept.tolist() == [[[True, True, True, True, False, False]]]


def test_top_p_stops_at_the_token_that_reaches_it() -> None:
    """Masses 1/2, 1/4, 1/8, 1/8: 0.5 is reached by the first, 0.51 needs the second, 0.75 no more."""
    logits = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()[None, None]
    for top_p, count in [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 4), (1e-6, 1), (0.0, 4), (1.0, 4), (-1.0, 4)]:
        assert torch.isfinite(filter_logits(logits, *scalars(0, top_p, 1.0))).sum().item() == count, top_p


def test_zero_temperature_is_greedy() -> None:
    logits, uniform = random_case(64)
    assert torch.equal(draw_tokens(logits, uniform, *scalars(0, 0.0, 0.0)), logits.argmax(-1))


class Sampler(torch.nn.Module):
    """Both functions as one graph."""

    def forward(self, logits, uniform, top_k, top_p, temperature):
        filtered = filter_logits(logits, top_k, top_p, temperature)
        return draw_tokens(logits, uniform, top_k, top_p, temperature), filtered


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    logits, uniform = random_case(256)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.onnx.export(
        Sampler().eval(),
        (logits, uniform, *scalars(900, 0.96, 1.0)),
        input_names=["logits", "uniform", "top_k", "top_p", "temperature"],
        output_names=["tokens", "filtered"],
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}, None, None, None),
        opset_version=23,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    path = tmp_path_factory.mktemp("sampler") / "sampler.onnx"
    program.save(str(path))
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, *args: torch.Tensor) -> list[torch.Tensor]:
    names = [port.name for port in session.get_inputs()]
    outputs = session.run(None, {name: arg.numpy() for name, arg in zip(names, args, strict=True)})
    return [torch.from_numpy(x) for x in outputs]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 37)])
def test_onnx_draws_the_same(
    session: onnxruntime.InferenceSession, setting: tuple[int, float, float], shape: tuple[int, int]
) -> None:
    logits, uniform = (x[: shape[0], : shape[1]].contiguous() for x in random_case(256, seed=9))
    tokens, filtered = run(session, logits, uniform, *scalars(*setting))
    expected = filter_logits(logits, *scalars(*setting))
    torch.testing.assert_close(filtered, expected, rtol=1e-6, atol=0)
    assert torch.equal(tokens, draw_tokens(logits, uniform, *scalars(*setting)))
    assert wrong_draws(tokens, logits, uniform, *setting) == 0
