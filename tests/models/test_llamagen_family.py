"""LlamaGen as a family: loading, the plan, and a tiny model from quantiser to player."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from qexport_models.llamagen.config import GPTConfig, VQConfig
from qexport_models.llamagen.family import DEFAULT_LAYERS, ENTRIES, assemble, load
from qexport_models.llamagen.model import GPT
from qexport_models.llamagen.vq import VQ
from qexport_models.published import PUBLISHED
from qexport_models.strict_load import build_strict
from safetensors.torch import save_file
from support import published_lists, state_of, tensors

import qexport.runtime as runtime
from qexport.bundle import Bundle
from qexport.errors import CheckpointError
from qexport.family import Generator, ModelEntry, find_model
from qexport.pipeline import export
from qexport.quantize import apply_stored, stored_weights
from qexport.recipe import Recipe, recipe_for
from qexport.reference.backend import torch_player
from qexport.runtime import CallRecord, Player
from qexport.scheme import preset

GPT_CONFIG = GPTConfig(depth=2, heads=4, width=64, length=16, vocab_size=64, num_classes=10)
VQ_CONFIG = VQConfig(ch_mult=(1, 2), codes=64, z_channels=32, ch=32)
TINY = ModelEntry(
    name="llamagen-tiny",
    family="llamagen",
    image_size=8,
    num_classes=10,
    parameters=0,
    files=("gpt.pt", "vq.pt"),
    source="tests",
    licence="MIT",
    bundled=False,
    config={"gpt": GPT_CONFIG, "vq": VQ_CONFIG},
)
LIMIT = 2e-5  # DESIGN.md, idea 4: fp32 compute, weight-only
IMAGE_LIMIT = 1e-4  # likewise, on identical tokens
BITS = (16, 8, 4)
MODES = {
    "greedy": {"cfg": 4.0, "top_k": 1},
    "all tokens": {"cfg": 2.0},
    "filtered": {"cfg": 2.0, "cfg_interval": 6, "top_k": 20, "top_p": 0.9},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    return tensors("llamagen-tiny-shared")


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return published_lists("llamagen")


def weights(file: str) -> dict[str, torch.Tensor]:
    return state_of(tensors(f"{file}-tiny-shared"))


def build() -> Generator:
    gpt = build_strict(lambda: GPT(GPT_CONFIG), weights("llamagen"), "a tiny GPT")
    vq = build_strict(lambda: VQ(VQ_CONFIG), weights("llamagen-vq"), "a tiny VQ")
    return assemble(TINY, gpt, vq, {})


def recipe(bits: int) -> Recipe:
    return recipe_for(preset(bits), DEFAULT_LAYERS, f"w{bits}a16")


def quantised(bits: int) -> Generator:
    """The quantised torch model."""
    generator = build()
    apply_stored(generator, stored_weights(generator, recipe(bits)))
    return generator


@pytest.fixture(scope="module")
def references() -> dict[int, Player[Any]]:
    return {bits: torch_player(quantised(bits)) for bits in BITS}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Bundle]:
    """One bundle for each width."""
    folder = tmp_path_factory.mktemp("llamagen")
    return {bits: export(build(), recipe(bits), folder / str(bits), progress=lambda *_: None) for bits in BITS}


@pytest.fixture(scope="module")
def players(bundles: dict[int, Bundle]) -> dict[int, Player[Any]]:
    return {
        bits: runtime.load(bundle.path, provider="cpu", options="exact", threads=1).player
        for bits, bundle in bundles.items()
    }


def play(
    player: Player[Any], labels: list[int], seed: int = 0, **inputs: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The images, and of all steps one after another: tokens and logits; the caches after the last."""
    steps: list[dict[str, np.ndarray]] = []

    def observe(record: CallRecord[Any]) -> None:
        if record.graph == "token":
            steps.append({name: np.array(player.backend.get(value)) for name, value in record.results.items()})

    images = player.play({"label": labels, **inputs}, seed=seed, observer=observe, extra_outputs={"token": ("logits",)})
    joined = {name: np.concatenate([step[name] for step in steps], axis=1) for name in ("next_token", "logits")}
    assert np.array_equal(steps[-1]["next_sequence"], joined["next_token"])
    return images, {**steps[-1], **joined}


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64)))


def test_the_plan_plays_the_originals_loop_on_torch(data: dict[str, torch.Tensor]) -> None:
    _, steps = play(torch_player(build()), data["in.cond_idx"].tolist(), cfg=4.0, top_k=1)
    assert np.array_equal(steps["next_token"], data["greedy.tokens"].numpy())
    assert relative_l2(steps["logits"], data["greedy.cfg_logits"].numpy()) <= LIMIT


def test_greedy_tokens_are_the_originals(players: dict[int, Player[Any]], data: dict[str, torch.Tensor]) -> None:
    """Matrices are stored in fp16, so its logits differ by 1e-4; its nearest two tokens lie 0.19 apart."""
    images, steps = play(players[16], data["in.cond_idx"].tolist(), cfg=4.0, top_k=1)
    assert np.array_equal(steps["next_token"], data["greedy.tokens"].numpy())
    assert relative_l2(steps["logits"], data["greedy.cfg_logits"].numpy()) <= 1e-3
    assert images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("bits", "mode", "labels"),
    [(bits, mode, [0, 9, 4]) for bits in BITS for mode in MODES] + [(bits, "all tokens", [3]) for bits in BITS],
)
def test_every_step_is_torchs(
    players: dict[int, Player[Any]], references: dict[int, Player[Any]], bits: int, mode: str, labels: list[int]
) -> None:
    images, ours = play(players[bits], labels, seed=7, **MODES[mode])
    expected, theirs = play(references[bits], labels, seed=7, **MODES[mode])
    assert np.array_equal(ours["next_token"], theirs["next_token"])
    for position in range(GPT_CONFIG.length):
        assert relative_l2(ours["logits"][:, position], theirs["logits"][:, position]) <= LIMIT, position
    for name in ("key.0", "value.1"):
        assert relative_l2(ours[name], theirs[name]) <= LIMIT
    assert np.abs(images - expected).max() <= IMAGE_LIMIT


def _double_one_scale(generator: Generator) -> None:
    name = generator.layers["layers.1.feed_forward.w2"][1]
    generator.graph("token").parameters()[name][5, 32:64] *= 2


def _swap_nibbles(generator: Generator) -> None:
    weight = generator.graph("token").parameters()[generator.layers["layers.0.attention.wo"][1]]
    weight.copy_(weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def _skip_a_layer(generator: Generator) -> None:
    names = [generator.layers[f"layers.1.{matrix}"][1] for matrix in ("attention.wo", "feed_forward.w2")]
    for name in names:
        generator.graph("token").parameters()[name].zero_()


@pytest.mark.parametrize("mutate", [_double_one_scale, _swap_nibbles, _skip_a_layer], ids=lambda f: f.__name__)
def test_mutations_fail(players: dict[int, Player[Any]], mutate: Callable[[Generator], None]) -> None:
    broken = quantised(4)
    mutate(broken)
    _, ours = play(players[4], [3], seed=7, cfg=4.0, top_k=1)
    _, theirs = play(torch_player(broken), [3], seed=7, cfg=4.0, top_k=1)
    assert relative_l2(ours["logits"][:, 0], theirs["logits"][:, 0]) > LIMIT


@pytest.mark.parametrize("bits", [8, 4])
def test_every_matrix_of_the_layers_is_quantised(bundles: dict[int, Bundle], bits: int) -> None:
    graph = onnx.load(bundles[bits].path / "token.onnx", load_external_data=False).graph
    made_by = {output: node for node in graph.node for output in node.output}
    matmuls = [node for node in graph.node if node.op_type == "MatMul"]
    dequantised = {node.name for node in matmuls if made_by[node.input[1]].op_type == "DequantizeLinear"}
    assert dequantised == {layer for layer in build().layers if layer.startswith("layers.")}
    assert len(dequantised) == 5 * GPT_CONFIG.depth
    assert [node.name for node in matmuls if node.name not in dequantised] == ["output"]


def test_caches_can_be_written_in_place(bundles: dict[int, Bundle]) -> None:
    """A cache's only reader is the scatter that makes its successor, of the same shape; nothing grows."""
    graph = onnx.load(bundles[16].path / "token.onnx", load_external_data=False).graph
    shapes = {value.name: str(value.type) for value in (*graph.input, *graph.output)}
    for name in (f"{kind}.{i}" for kind in ("key", "value") for i in range(GPT_CONFIG.depth)):
        (reader,) = [node for node in graph.node if f"past_{name}" in node.input]
        assert reader.op_type == "ScatterElements"
        assert list(reader.output) == [name]
        assert shapes[name] == shapes[f"past_{name}"]
    declared = {state.name: state.shape for state in bundles[16].plan.state}
    assert declared["key.0"] == ("2*batch", 4, 16, 16)


def _spy(player: Player[Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Feeds and results of every call that is made in place."""
    seen, original = [], player.backend.run_in_place

    def run(graph: str, feeds: Any, outputs: Any, shared: Any) -> Any:
        results = original(graph, feeds, outputs, shared)
        if shared:
            seen.append((feeds, results))
        return results

    monkeypatch.setattr(player.backend, "run_in_place", run)
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_caches_are_written_in_place_and_nothing_changes(
    players: dict[int, Player[Any]], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Bit for bit; one buffer from the first step to the last. An observer keeps what it saw, so it gets copies."""
    player, inputs = players[4], {"label": [2, 5], **MODES[mode]}
    seen = _spy(player, monkeypatch)
    steps: list[CallRecord[Any]] = []
    copied = player.play(inputs, seed=3, observer=steps.append, extra_outputs={"token": ("logits",)})
    assert not seen
    in_place = player.play(inputs, seed=3)
    np.testing.assert_array_equal(in_place, copied)

    assert len(seen) == GPT_CONFIG.length
    caches = player.plan.calls[0].in_place
    assert caches == ("key.0", "value.0", "key.1", "value.1")
    for name in caches:
        (address,) = {r[name].data_ptr() for _, r in seen} | {f[f"past_{name}"].data_ptr() for f, _ in seen}
        assert address
        assert len({step.results[name].data_ptr() for step in steps[:2]}) == 2
        np.testing.assert_array_equal(seen[-1][1][name].numpy(), steps[GPT_CONFIG.length - 1].results[name].numpy())
    np.testing.assert_array_equal(seen[-1][1]["next_sequence"].numpy(), steps[-2].results["next_sequence"].numpy())


@pytest.mark.parametrize("bits", BITS)
def test_in_place_changes_nothing_as_it_is_served(bundles: dict[int, Bundle], bits: int) -> None:
    """Under the options that `generate` uses, whose graph optimisations are the runtime's own; many threads."""
    player = runtime.load(bundles[bits].path, provider="cpu", options="serve").player
    inputs = {"label": [2, 5, 0], **MODES["filtered"]}
    copied = player.play(inputs, seed=6, observer=lambda _: None)
    for _ in range(3):
        np.testing.assert_array_equal(player.play(inputs, seed=6), copied)


def test_the_comparison_notices_a_cache_that_is_not_kept(
    players: dict[int, Player[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation: one cache comes back as it went in, as if the scatter had gone to another buffer."""
    player, backend = players[4], players[4].backend
    expected = player.play({"label": [2, 5]}, seed=3)

    def run(graph: str, feeds: Any, outputs: Any, shared: Any) -> Any:
        if not shared:
            return type(backend).run_in_place(backend, graph, feeds, outputs, shared)
        kept = backend.put(feeds["past_value.0"].numpy().copy())
        return {**type(backend).run_in_place(backend, graph, feeds, outputs, shared), "value.0": kept}

    monkeypatch.setattr(backend, "run_in_place", run)
    assert np.abs(player.play({"label": [2, 5]}, seed=3) - expected).max() > IMAGE_LIMIT


def test_an_older_bundle_plays_as_it_did(players: dict[int, Player[Any]]) -> None:
    """Its plan says nothing of overwriting; a player that knows of it copies."""
    player, data = players[4], players[4].plan.to_json()
    for call in data["calls"]:
        del call["in_place"]
    plan = type(player.plan).from_json(data)
    assert plan.calls[0].in_place == ()
    older = Player(plan, player.backend, player._tables)
    np.testing.assert_array_equal(older.play({"label": [7]}, seed=1), player.play({"label": [7]}, seed=1))


def test_images_do_not_depend_on_their_batch(bundles: dict[int, Bundle]) -> None:
    loaded = runtime.load(bundles[4].path, provider="cpu", threads=1)
    together = loaded.generate([1, 4, 8], seed=5)
    one_by_one = loaded.generate([1, 4, 8], seed=5, batch=1)
    np.testing.assert_allclose(together, one_by_one, atol=IMAGE_LIMIT)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_each_weight_is_in_one_graph_and_no_training_weight_in_any(bundles: dict[int, Bundle]) -> None:
    names = [
        {
            tensor.name
            for tensor in onnx.load(bundles[4].path / f"{graph}.onnx", load_external_data=False).graph.initializer
        }
        for graph in ("token", "decode")
    ]
    weights_of = [{name for name in found if not name.startswith("constant.")} for found in names]
    assert not weights_of[0] & weights_of[1]
    assert not [name for name in weights_of[1] if name.startswith(("encoder", "quant_conv", "quantize.codebook_used"))]
    assert "rope_rows" not in weights_of[0]


def test_rotary_rows_keep_float32(bundles: dict[int, Bundle], data: dict[str, torch.Tensor]) -> None:
    rope = bundles[4].tables()["rope"]
    assert rope.dtype == np.float32
    np.testing.assert_allclose(rope, data["out.freqs_cis"][:16], rtol=0, atol=1e-7)


def test_teacher_forcing(data: dict[str, torch.Tensor]) -> None:
    quality = build().quality
    assert quality is not None
    assert list(quality.scale_lengths) == [16]
    logits = quality.teacher_forced_logits(data["in.cond_idx"], data["in.idx"])
    assert relative_l2(logits.numpy(), data["out.tf_logits"][:, :16].numpy()) <= LIMIT
    vq = tensors("llamagen-vq-tiny-shared")
    assert torch.equal(quality.tokenize((vq["in.img"] + 1) / 2).flatten(), vq["out.indices"])


def test_published_models_are_listed(published: dict[str, Any]) -> None:
    assert [entry.name for entry in ENTRIES] == [
        *("llamagen-b-256", "llamagen-l-256", "llamagen-b-384", "llamagen-l-384"),
        *("llamagen-xl-384", "llamagen-xxl-384", "llamagen-xxxl-384", "llamagen-1b-384", "llamagen-3b-384"),
    ]
    for entry in ENTRIES:
        _, size, pixels = entry.name.split("-")
        assert find_model(entry.name)[1] is entry
        assert entry.parameters == published[f"c2i_GPT-{size.upper()}"]["parameters"]
        assert ("no published weights" in entry.source) == (size in ("1b", "xxxl")) == (entry.files[0] not in PUBLISHED)
        assert entry.files == (f"c2i_{size.upper()}_{pixels}.pt", "vq_ds16_c2i.pt")
        assert entry.config["gpt"].side * entry.config["vq"].downsample == entry.image_size == int(pixels)
        assert entry.licence == "MIT"


def test_defaults_are_those_of_the_published_figures() -> None:
    """Of every model, without its weights."""
    guidance = {"b": 2.0, "l": 2.0, "xl": 1.75, "xxl": 1.75, "3b": 1.65, "1b": 2.0, "xxxl": 2.0}
    for entry in ENTRIES:
        with torch.device("meta"):
            generator = assemble(entry, GPT(entry.config["gpt"]), VQ(entry.config["vq"]), {})
        defaults = {i.name: i.default for i in generator.plan.inputs}
        assert defaults.pop("cfg") == guidance[entry.name.split("-")[1]]
        assert defaults == {"label": None, "cfg_interval": -1, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        assert generator.plan.calls[0].repeat == entry.config["gpt"].length
        assert len(generator.layers) == 5 * entry.config["gpt"].depth + 1


def _flat(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save(state, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def _nested(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save({"model": state, "steps": 300_000}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def _safetensors(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("write", [_flat, _nested, _safetensors], ids=lambda f: f.__name__)
def test_checkpoints_load(
    tmp_path: Path, data: dict[str, torch.Tensor], write: Callable[[dict[str, torch.Tensor], Path], Path]
) -> None:
    files = write(weights("llamagen"), tmp_path / "gpt"), write(weights("llamagen-vq"), tmp_path / "vq")
    generator = load(TINY, str(files[0]), str(files[1]))
    assert generator.quality is not None
    logits = generator.quality.teacher_forced_logits(data["in.cond_idx"], data["in.idx"])
    assert relative_l2(logits.numpy(), data["out.tf_logits"][:, :16].numpy()) <= LIMIT
    assert set(generator.checkpoint_sha256) == {"model", "vae"}


def _renamed(state: dict[str, torch.Tensor]) -> str:
    state["layers.1.attention.proj.weight"] = state.pop("layers.1.attention.wo.weight")
    return r"missing: layers\.1\.attention\.wo\.weight; unexpected: layers\.1\.attention\.proj\.weight"


def _deeper(state: dict[str, torch.Tensor]) -> str:
    state |= {
        key.replace("layers.1.", "layers.2."): value.clone() for key, value in state.items() if "layers.1." in key
    }
    return r"unexpected: layers\.2\.\S+, .* and 4 more"


def _wider(state: dict[str, torch.Tensor]) -> str:
    state["norm.weight"] = torch.ones(128)
    return r"wrong shape: norm\.weight is \(128,\), expected \(64,\)"


@pytest.mark.parametrize("damage", [_renamed, _deeper, _wider], ids=lambda f: f.__name__)
def test_another_architecture_is_one_clear_line(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    state = weights("llamagen")
    expected = damage(state)
    files = _safetensors(state, tmp_path / "gpt"), _safetensors(weights("llamagen-vq"), tmp_path / "vq")
    with pytest.raises(CheckpointError, match=expected) as error:
        load(TINY, str(files[0]), str(files[1]))
    assert "llamagen-tiny (gpt.safetensors)" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["var", "dit", "llamagen", "llamagen-vq"])
def test_another_model_is_one_clear_line(tmp_path: Path, file: str) -> None:
    """Files of other families, and a tiny LlamaGen, offered as a published one."""
    path = _safetensors(weights(file), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"checkpoint is not llamagen-b-256 \(other\.safetensors\); ") as error:
        load(find_model("llamagen-b-256")[1], str(path), str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_the_wrong_tokeniser_is_one_clear_line(tmp_path: Path) -> None:
    files = _safetensors(weights("llamagen"), tmp_path / "gpt"), _safetensors(weights("var-vae"), tmp_path / "vae")
    with pytest.raises(CheckpointError, match=r"checkpoint is not its VQ tokeniser \(vae\.safetensors\); ") as error:
        load(TINY, str(files[0]), str(files[1]))
    assert "\n" not in str(error.value)


def test_parts_of_different_vocabularies_are_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="64 codes, the transformer 16384"):
        assemble(TINY, GPT(GPTConfig(depth=1, heads=4, width=64, length=16)), VQ(VQ_CONFIG), {})
