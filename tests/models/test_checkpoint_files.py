"""From a user's file to a VAR: what loads, and the one line that a file gets which does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from qexport_models import published
from qexport_models.checkpoints import BUNDLED, locate, read_state, sha256
from qexport_models.published import PUBLISHED, Published, hub_commit
from qexport_models.var.family import ENTRIES, load
from safetensors.torch import load_file, save_file

from qexport.errors import CheckpointError
from qexport.family import Generator

ENTRY = ENTRIES[0]
D16 = next(entry for entry in ENTRIES if entry.name == "var-d16")
VAE = str(BUNDLED / ENTRY.files[1])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(BUNDLED / ENTRY.files[0])


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("QEXPORT_CHECKPOINTS", str(tmp_path / "checkpoints"))


def parameters(generator: Generator) -> dict[str, torch.Tensor]:
    return {f"{spec.name}.{name}": value for spec in generator.graphs for name, value in spec.parameters().items()}


def same(one: Generator, two: Generator) -> bool:
    a, b = parameters(one), parameters(two)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(path: Path, vae: str | None = VAE) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(ENTRY, str(path), vae)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path: Path, state: dict) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def test_all_ways_give_the_same_model(tmp_path, state):
    reference = load(ENTRY, None, None)
    vae = load_file(VAE)
    torch.save({"ema": {f"module.{key}": value for key, value in state.items()}, "step": 3}, tmp_path / "one.pt")
    torch.save(state, tmp_path / "two.pth", _use_new_zipfile_serialization=False)
    for file, how in (("one.pt", VAE), ("two.pth", VAE)):
        loaded = load(ENTRY, str(tmp_path / file), how)
        assert same(loaded, reference)
        assert loaded.checkpoint_sha256["model"] == sha256(tmp_path / file)
    assert read_state(tmp_path / "one.pt").keys() == state.keys()

    torch.save({"trainer": {"vae_local": vae, "var_wo_ddp": state}}, tmp_path / "trainer.pth")
    assert same(load(ENTRY, str(tmp_path / "trainer.pth"), None), reference)

    for name, part in (("transformer", state), ("vae", vae)):
        (tmp_path / "folder" / name).mkdir(parents=True)
        saved(tmp_path / "folder" / name / "diffusion_pytorch_model.safetensors", part)
    assert same(load(ENTRY, str(tmp_path / "folder"), None), reference)


def test_float32_weights_stay_views_of_the_file(tmp_path, state):
    path = saved(tmp_path / "m.safetensors", {k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert str(path) not in mapped
    generator = load(ENTRY, str(path), VAE)
    assert generator.graphs
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert str(path) in mapped


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_dtypes_are_read_as_float32(tmp_path, state, dtype):
    path = saved(tmp_path / "m", {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()})
    found = parameters(load(ENTRY, str(path), VAE))["step.head.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, state["head.weight"].to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes_are_refused(tmp_path, state, dtype):
    path = tmp_path / "m.pth"
    torch.save(state | {"head.weight": state["head.weight"].to(dtype)}, path)
    text = refusal(path)
    assert f"wrong dtype: head.weight is {str(dtype).removeprefix('torch.')}, expected a float" in text
    assert "looks like" not in text
    torch.save(state | {"lvl_1L": state["lvl_1L"].float()}, path)
    assert "lvl_1L is float32, expected int64" in refusal(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, state, bad):
    weight = state["blocks.1.ffn.fc2.weight"].clone()
    weight[3, 4:6] = bad
    text = refusal(saved(tmp_path / "m", state | {"blocks.1.ffn.fc2.weight": weight}))
    assert "blocks.1.ffn.fc2.weight holds NaN or infinity (2 of 65,536)" in text


def test_large_finite_weights_are_not_taken_for_infinite(tmp_path, state):
    huge = torch.full_like(state["head.weight"], 3e38, dtype=torch.float32)
    path = saved(tmp_path / "m", state | {"head.weight": huge})
    assert parameters(load(ENTRY, str(path), VAE))["step.head.weight"].max() > 2e38


def test_keys_and_shapes_that_differ_are_shown(tmp_path, state):
    changed = dict(state)
    del changed["head.bias"]
    changed["extra.weight"] = torch.ones(2)
    changed["word_embed.bias"] = torch.ones(7)
    text = refusal(saved(tmp_path / "m.safetensors", changed))
    assert "not var-c10-d2 (m.safetensors)" in text
    assert "missing: head.bias; unexpected: extra.weight; wrong shape: word_embed.bias is (7,), expected (128,)" in text
    assert "looks like" not in text


def test_another_model_is_named(tmp_path):
    assert "this looks like var-c10-d3" in refusal(BUNDLED / "var-c10-d3.safetensors")
    assert "this looks like dit-c10-d2" in refusal(BUNDLED / "dit-c10-d2.safetensors")
    assert "this looks like VAR's VQVAE" in refusal(BUNDLED / ENTRY.files[1])
    swapped = refusal(BUNDLED / ENTRY.files[0], str(BUNDLED / ENTRY.files[0]))
    assert "not its VQVAE" in swapped
    assert "this looks like var-c10-d2" in swapped


def test_option_is_named_where_nothing_lies(tmp_path):
    with pytest.raises(CheckpointError, match=r"^--vae-checkpoint .*/none: does not exist"):
        load(ENTRY, None, str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"^--checkpoint .*/empty: holds no weights"):
        load(ENTRY, str(tmp_path / "empty"), None)


# -- published files --


def hub(monkeypatch, download) -> None:
    """A huggingface_hub whose cache is empty; `download(repository, name)` is what it fetches."""

    class LocalEntryNotFoundError(FileNotFoundError):
        pass

    def one(repository, name, *, local_files_only, revision, etag_timeout):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return download(repository, name)

    def many(repository, *, allow_patterns, local_files_only, revision, etag_timeout):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return download(repository, *allow_patterns)

    errors = SimpleNamespace(LocalEntryNotFoundError=LocalEntryNotFoundError)
    constants = SimpleNamespace(ENDPOINT="https://huggingface.co")
    module = SimpleNamespace(hf_hub_download=one, snapshot_download=many, errors=errors, constants=constants)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.setattr(published, "_reachable", lambda endpoint: True)
    monkeypatch.delenv("HF_HUB_OFFLINE")


def located(entry=D16, position=0) -> Path:
    return locate(entry, entry.files[position], None, "--checkpoint")


def test_without_a_network_the_message_says_what_to_put_where(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError) as caught:
        located()
    text = str(caught.value)
    assert text.startswith(
        "var-d16 needs var_d16.pth (https://huggingface.co/FoundationVision/var/resolve/main/var_d16"
    )
    assert f"licence MIT): put it at {tmp_path}/checkpoints/var_d16.pth, or pass --checkpoint FILE" in text

    hub(monkeypatch, None)
    monkeypatch.setattr(published, "_reachable", lambda endpoint: False)
    with pytest.raises(CheckpointError, match=r"put it at .*no network"):
        located()

    def refuse(repository, name):
        raise OSError("404 Client Error\nsecond line")

    hub_refusing = pytest.MonkeyPatch()
    with hub_refusing.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "")
        hub(patch, refuse)
        with pytest.raises(CheckpointError, match=r"put it at .*\(not fetched: 404 Client Error\)$"):
            located()


def test_huggingface_hub_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"put it at .*pip install huggingface-hub"):
        located()


def test_a_file_in_the_folder_is_taken_first(tmp_path, monkeypatch):
    hub(monkeypatch, None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "var_d16.pth").write_bytes(b"x")
    assert located() == tmp_path / "checkpoints" / "var_d16.pth"


def cached(tmp_path: Path, content: bytes, stated: str) -> Path:
    """A file as the Hub's cache holds it: a link from a snapshot to a blob named by its SHA-256."""
    blob = tmp_path / "blobs" / stated
    link = tmp_path / "snapshots" / COMMIT / "var_d16.pth"
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.unlink(missing_ok=True)
    link.symlink_to(blob)
    return link


def test_fetched_file_is_compared_with_the_hash_that_the_hub_states(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "x").write_bytes(b"weights")
    good = cached(tmp_path, b"weights", sha256(tmp_path / "x"))
    hub(monkeypatch, lambda *what: asked.append(what) or str(good))
    assert located() == good
    assert asked == [("FoundationVision/var", "var_d16.pth")]
    assert hub_commit(good) == COMMIT
    marked = published.with_commits(D16, {"model": good, "vae": good})
    assert marked.source.endswith(f"FoundationVision/var at {COMMIT}")
    assert published.with_commits(D16, {"model": tmp_path / "x"}) is D16

    bad = cached(tmp_path, b"damaged", sha256(tmp_path / "x"))
    hub_again = pytest.MonkeyPatch()
    with hub_again.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "")
        hub(patch, lambda *what: str(bad))
        with pytest.raises(CheckpointError, match=r"is not the published var_d16\.pth"):
            located()


def test_known_hash_is_checked(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "var_d16.pth"
    path.write_bytes(b"weights")
    for stated, fits in ((sha256(path), True), ("0" * 64, False)):
        known = Published("r", "var_d16.pth", "u", sha256=stated)
        monkeypatch.setattr(published, "PUBLISHED", {"var_d16.pth": known})
        if fits:
            assert located() == path
        else:
            with pytest.raises(CheckpointError, match="expected 000000000000; delete it"):
                located()


def test_a_folder_of_the_hub(tmp_path, monkeypatch):
    """DiT's original lies on a web server; what the Hub has is a diffusers folder."""
    entry = SimpleNamespace(name="dit-xl-2-256", files=("DiT-XL-2-256x256.pt",), bundled=False, source="s", licence="l")
    asked = []
    (tmp_path / "transformer").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    hub(monkeypatch, lambda *what: asked.append(what) or str(tmp_path))
    assert located(entry).name == "diffusion_pytorch_model.bin"
    assert asked == [("facebook/DiT-XL-2-256", "transformer/*")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"https://dl\.fbaipublicfiles\.com/DiT/models/DiT-XL-2-256x256\.pt"):
        located(entry)


def test_every_published_entry_has_its_files_in_the_table():
    for entry in ENTRIES:
        assert entry.bundled or not entry.published or set(entry.files) <= set(PUBLISHED)


def test_restricting_licences_are_said():
    from dataclasses import replace

    assert D16.licence_note is None
    limited = replace(D16, licence="CC-BY-NC-4.0: non-commercial use only")
    assert limited.licence_note == "licence of var-d16: CC-BY-NC-4.0: non-commercial use only"
