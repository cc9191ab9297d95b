"""LlamaGen's transformer against the original's outputs, and its published layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from qexport_models.llamagen.config import GPT_CONFIGS, GPTConfig
from qexport_models.llamagen.model import GPT
from qexport_models.llamagen.rope import rope_table
from qexport_models.llamagen.token_step import TokenStep
from qexport_models.sampling import filter_logits
from support import published_lists, tensors

CONFIG = GPTConfig(depth=2, heads=4, width=64, length=16, vocab_size=64, num_classes=10)
LIMIT = 2e-5  # DESIGN.md, idea 4: fp32 compute, teacher-forced
MODES = {"greedy": (4.0, -1, 1, 0.0), "sampled": (2.0, -1, 20, 0.9)}
"""cfg, cfg_interval, top_k, top_p of the fixture's two loops; its greedy is an argmax, ours is top_k = 1."""


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    return tensors("llamagen-tiny-shared")


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return published_lists("llamagen")


def build(data: dict[str, torch.Tensor]) -> GPT:
    gpt = GPT(CONFIG).eval().requires_grad_(False)
    gpt.load_state_dict({key[3:]: value for key, value in data.items() if key.startswith("sd.")}, strict=True)
    return gpt


@pytest.fixture(scope="module")
def gpt(data: dict[str, torch.Tensor]) -> GPT:
    return build(data)


def relative_l2(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def start(batch: int, fill: float = 0.0) -> list[torch.Tensor]:
    """Token, sequence, and the caches of every layer."""
    caches = [torch.full((2 * batch, CONFIG.heads, CONFIG.length, CONFIG.head_width), fill) for _ in range(2 * 2)]
    return [torch.zeros(batch, 1, dtype=torch.int64), torch.zeros(batch, CONFIG.length, dtype=torch.int64), *caches]


def play(
    gpt: GPT, labels: torch.Tensor, uniform: torch.Tensor, setting: tuple[float, int, int, float], **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the loop: (tokens, logits); `forced` tokens replace the drawn ones as the next step's input."""
    step, forced = TokenStep(gpt), kwargs.get("forced")
    token, sequence, *caches = start(len(labels), kwargs.get("fill", 0.0))
    cfg, cfg_interval, top_k, top_p = setting
    scalars = [torch.tensor(x) for x in (cfg, cfg_interval, top_k, top_p, 1.0)]
    logits = []
    for i in range(CONFIG.length):
        given = (labels, token, sequence, uniform[:, i : i + 1], torch.tensor(i), gpt.rope_rows[i])
        token, row, sequence, *caches = step(*given, *scalars, *caches)
        assert torch.equal(sequence[:, i : i + 1], token)
        logits.append(row)
        if forced is not None:
            token = forced[:, i : i + 1]
    return sequence, torch.cat(logits, dim=1)


def test_rope_table_is_the_originals(data: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(rope_table(4, 16, 10000.0), data["out.freqs_cis"], rtol=0, atol=1e-7)


def test_teacher_forced_logits(gpt: GPT, data: dict[str, torch.Tensor]) -> None:
    labels, tokens = data["in.cond_idx"], data["in.idx"]
    null = torch.full_like(labels, CONFIG.num_classes)
    assert relative_l2(gpt(labels, tokens), data["out.tf_logits"]) <= LIMIT
    assert relative_l2(gpt(null, tokens), data["out.tf_logits_null"]) <= LIMIT
    assert relative_l2(gpt(labels, tokens[:, :8]), data["out.tf_prefix_logits"]) <= LIMIT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [0.0, 1e3])
def test_every_cached_step(gpt: GPT, data: dict[str, torch.Tensor], mode: str, fill: float) -> None:
    """Fed the original's tokens, every step gives its guided logits, whatever lies in unwritten cache rows."""
    uniform = torch.zeros(2, CONFIG.length)
    forced = data[f"{mode}.tokens"].long()
    _, logits = play(gpt, data["in.cond_idx"], uniform, MODES[mode], forced=forced, fill=fill)
    for i in range(CONFIG.length):
        assert relative_l2(logits[:, i], data[f"{mode}.cfg_logits"][:, i]) <= LIMIT, i


def test_greedy_tokens_are_the_originals(gpt: GPT, data: dict[str, torch.Tensor]) -> None:
    tokens, _ = play(gpt, data["in.cond_idx"], torch.full((2, CONFIG.length), 0.7), MODES["greedy"])
    assert torch.equal(tokens, data["greedy.tokens"].long())


def test_filtered_masks_are_the_originals(gpt: GPT, data: dict[str, torch.Tensor]) -> None:
    """From our own logits; the nearest boundary here is 1e-2 (top-k, logits) and 9e-4 (top-p, mass) away."""
    forced = data["sampled.tokens"].long()
    setting = MODES["sampled"]
    _, logits = play(gpt, data["in.cond_idx"], torch.zeros(2, CONFIG.length), setting, forced=forced)
    ours = filter_logits(logits, torch.tensor(setting[2]), torch.tensor(setting[3]), torch.tensor(1.0))
    assert torch.equal(ours.isinf(), data["sampled.filtered_logits"].isinf())
    assert relative_l2(ours[ours.isfinite()], data["sampled.filtered_logits"][ours.isfinite()]) <= LIMIT
    assert ours.gather(-1, forced.unsqueeze(-1)).isfinite().all()


def test_steps_agree_with_teacher_forcing(gpt: GPT) -> None:
    """Without guidance the loop's logits are the plain model's on the tokens that it drew."""
    labels = torch.tensor([1, 4, 9])
    uniform = torch.rand(3, CONFIG.length, generator=torch.Generator().manual_seed(2))
    tokens, logits = play(gpt, labels, uniform, (1.0, -1, 0, 0.0))
    assert relative_l2(logits, gpt(labels, tokens)[:, : CONFIG.length]) <= LIMIT


@pytest.mark.parametrize("interval", [-1, 0, 5])
def test_guidance_stops_after_the_interval(gpt: GPT, interval: int) -> None:
    """The first token is position 0 and always guided; the i-th after it is guided while i ≤ interval."""
    labels, null = torch.tensor([1, 4]), torch.full((2,), CONFIG.num_classes)
    uniform = torch.full((2, CONFIG.length), 0.5)
    tokens, logits = play(gpt, labels, uniform, (3.0, interval, 0, 0.0))
    conditional, unconditional = gpt(labels, tokens)[:, :-1], gpt(null, tokens)[:, :-1]
    guided = unconditional + 3 * (conditional - unconditional)
    for position in range(CONFIG.length):
        on = position == 0 or interval < 0 or position - 1 <= interval
        expected = guided if on else conditional
        assert relative_l2(logits[:, position], expected[:, position]) <= LIMIT, position


def _skip_layer(gpt: GPT) -> None:
    gpt.layers = gpt.layers[:1]


def _swap_axes(gpt: GPT) -> None:
    turned = gpt.rope_rows[1:].unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1)
    gpt.rope_rows = torch.cat([gpt.rope_rows[:1], turned])


def _angle_zero_for_the_class(gpt: GPT) -> None:
    gpt.rope_rows[0, :, 0] = 1.0


def _swap_gates(gpt: GPT) -> None:
    for layer in gpt.layers:
        forward: Any = layer.feed_forward
        forward.w1, forward.w3 = forward.w3, forward.w1


def _double_one_scale(gpt: GPT) -> None:
    gpt.get_parameter("layers.1.feed_forward.w2.weight")[3] *= 2


@pytest.mark.parametrize(
    "mutate",
    [_skip_layer, _swap_axes, _angle_zero_for_the_class, _swap_gates, _double_one_scale],
    ids=lambda f: f.__name__,
)
def test_mutations_fail(data: dict[str, torch.Tensor], mutate: Callable[[GPT], None]) -> None:
    gpt = build(data)
    mutate(gpt)
    assert relative_l2(gpt(data["in.cond_idx"], data["in.idx"]), data["out.tf_logits"]) > LIMIT
    forced = data["greedy.tokens"].long()
    uniform = torch.zeros(2, CONFIG.length)
    _, logits = play(gpt, data["in.cond_idx"], uniform, MODES["greedy"], forced=forced)
    assert relative_l2(logits, data["greedy.cfg_logits"]) > LIMIT


@pytest.mark.parametrize("cfg", [3.9, 1.0])
def test_wrong_guidance_fails(gpt: GPT, data: dict[str, torch.Tensor], cfg: float) -> None:
    forced = data["greedy.tokens"].long()
    uniform = torch.zeros(2, CONFIG.length)
    _, logits = play(gpt, data["in.cond_idx"], uniform, (cfg, -1, 1, 0.0), forced=forced)
    assert relative_l2(logits, data["greedy.cfg_logits"]) > LIMIT


@pytest.mark.parametrize("name", GPT_CONFIGS)
def test_published_layouts_load_strictly(published: dict[str, Any], name: str) -> None:
    size = name.split("-")[1].upper()
    expected = published[f"c2i_GPT-{size}"]
    with torch.device("meta"):
        gpt = GPT(GPT_CONFIGS[name])
        gpt.load_state_dict({key: torch.empty(shape) for key, shape in expected["shapes"].items()}, strict=True)
    assert sum(parameter.numel() for parameter in gpt.parameters()) == expected["parameters"]
    assert gpt.config.ffn_width == expected["config"]["ffn_hidden"]
    assert gpt.rope_rows.device.type == "cpu"


def test_another_layout_is_refused(published: dict[str, Any]) -> None:
    shapes = dict(published["c2i_GPT-B"]["shapes"])
    shapes.pop("layers.3.ffn_norm.weight")
    with torch.device("meta"), pytest.raises(RuntimeError, match=r"layers\.3\.ffn_norm\.weight"):
        GPT(GPT_CONFIGS["llamagen-b-256"]).load_state_dict({k: torch.empty(s) for k, s in shapes.items()}, strict=True)


@pytest.mark.parametrize("wrong", [{"length": 15}, {"width": 66}, {"heads": 32}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"square|RoPE"):
        GPTConfig(**{"depth": 2, "heads": 4, "width": 64, "length": 16} | wrong)


CAPTIONED = replace(CONFIG, num_classes=0, caption_width=24, condition_tokens=6)


def _captioned() -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """A tiny text-to-image transformer, features and tokens of two images."""
    torch.manual_seed(0)
    gpt = GPT(CAPTIONED).eval().requires_grad_(False)
    return gpt, torch.randn(2, 6, 24), torch.randint(0, CONFIG.vocab_size, (2, CONFIG.length))


def test_captions_condition_every_token() -> None:
    """One row of logits for each token, none before the whole caption is read, and none that sees a later token."""
    gpt, features, tokens = _captioned()
    logits = gpt(features, tokens)
    assert logits.shape == (2, 1 + CONFIG.length, CONFIG.vocab_size)
    for k in range(6):
        changed = features.clone()
        changed[:, k] += 1
        assert ((gpt(changed, tokens) - logits).abs().amax((0, 2)) > 1e-3).all(), k
    later = tokens.clone()
    later[:, 7] = (later[:, 7] + 1) % CONFIG.vocab_size
    torch.testing.assert_close(gpt(features, later)[:, :8], logits[:, :8])
    assert (gpt(features, later)[:, 8:] - logits[:, 8:]).abs().max() > 1e-3


def test_the_caption_is_projected_as_the_original_does() -> None:
    """fc2(gelu(fc1 x)), by hand in float64 with the tanh form of GELU; the exact form is 1e-4 away."""
    gpt, features, _ = _captioned()
    state = {key: value.double() for key, value in gpt.cls_embedding.state_dict().items()}
    x = features.double() @ state["cap_proj.fc1.weight"].T
    gelu = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert relative_l2(gpt.cls_embedding(features), gelu @ state["cap_proj.fc2.weight"].T) <= LIMIT
    exact = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    assert relative_l2(gpt.cls_embedding(features), exact @ state["cap_proj.fc2.weight"].T) > LIMIT


def test_one_caption_token_is_a_class_token() -> None:
    """With one feature, projected to what the class embeds to, the models agree: the rest is one transformer."""
    torch.manual_seed(1)
    by_class = GPT(CONFIG).eval().requires_grad_(False)
    by_caption = GPT(replace(CAPTIONED, condition_tokens=1)).eval().requires_grad_(False)
    shared = {k: v for k, v in by_class.state_dict().items() if not k.startswith("cls_embedding")}
    assert not by_caption.load_state_dict(shared, strict=False).unexpected_keys
    tokens = torch.randint(0, CONFIG.vocab_size, (1, CONFIG.length))
    features = torch.randn(1, 1, 24)
    by_class.cls_embedding.embedding_table.weight[3] = by_caption.cls_embedding(features)[0, 0]
    torch.testing.assert_close(by_caption(features, tokens), by_class(torch.tensor([3]), tokens))
