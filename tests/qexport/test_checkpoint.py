"""Reading checkpoint files: every format and nesting, and files that are wrong on purpose."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qexport.checkpoint import companion, find_weights, open_checkpoint, sha256
from qexport.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([0.5, -1.0], dtype=torch.float16)}
OTHER = {"a.weight": torch.zeros(2, 3), "b.bias": torch.zeros(2, dtype=torch.float16)}


def same(found, expected=STATE) -> bool:
    return set(found) == set(expected) and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )


def saved(path: Path, value: object, **how) -> Path:
    torch.save(value, path, **how)
    return path


def refusal(path: Path, role="model") -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, role)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.bin", "m.safetensors", "m"])
@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
def test_format_is_told_by_content_not_by_suffix(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        saved(path, STATE, _use_new_zipfile_serialization=kind == "torch")
    opened = open_checkpoint(path)
    assert same(opened.state)
    assert opened.shapes == {"a.weight": (2, 3), "b.bias": (2,)}
    assert opened.trail == ()


OPTIMIZER = {"state": {0: {"step": torch.ones(())}}}
TRAINER = {
    "epoch": 3,
    "trainer": {"config": {"lr": 1e-4}, "vae_local": OTHER, "var_wo_ddp": STATE, "var_opt": OPTIMIZER},
}
NESTED = {
    "ema first": ({"model": OTHER, "ema": STATE, "opt": OPTIMIZER}, ("ema",)),
    "an empty ema": ({"model": STATE, "ema": None}, ("model",)),
    "state_dict": ({"epoch": 1, "state_dict": STATE}, ("state_dict",)),
    "module in state": ({"state": {"module": STATE}}, ("state", "module")),
    "ema inside": ({"model": {"ema": STATE, "plain": OTHER}}, ("model", "ema")),
    "trainer": (TRAINER, ("trainer", "var_wo_ddp")),
    "DataParallel": ({f"module.{key}": value for key, value in STATE.items()}, ()),
    "compiled": ({f"_orig_mod.module.{key}": value for key, value in STATE.items()}, ()),
    "compiled inside": ({"a._orig_mod.weight": STATE["a.weight"], "b._orig_mod.bias": STATE["b.bias"]}, ()),
    "averaged model": ({"n_averaged": torch.tensor(7)} | {f"module.{k}": v for k, v in STATE.items()}, ()),
    "options beside": ({"model": STATE, "args": argparse.Namespace(lr=1e-4, name="x")}, ("model",)),
}


@pytest.mark.parametrize("case", NESTED)
def test_nested_dicts_are_unwrapped_averaged_weights_first(tmp_path, case, monkeypatch):
    raw, trail = NESTED[case]
    logged: list[str] = []
    monkeypatch.setattr("qexport.checkpoint.read.log.info", lambda text, *values: logged.append(text % values))
    opened = open_checkpoint(saved(tmp_path / "m.pth", raw))
    assert same(opened.state)
    assert opened.trail == trail
    assert len(logged) == 1
    assert " → ".join(trail) in logged[0]


def test_a_trainer_file_holds_the_decoder_too(tmp_path):
    path = saved(tmp_path / "m.pth", TRAINER)
    assert open_checkpoint(path, "vae").trail == ("trainer", "vae_local")
    assert companion(path) == str(path)
    assert companion(saved(tmp_path / "n.pth", {"model": STATE})) is None
    assert companion(None) is None


def test_several_models_without_a_known_name_are_not_guessed(tmp_path):
    assert "first, second" in refusal(saved(tmp_path / "m.pth", {"first": STATE, "second": OTHER}))


def sharded(folder: Path, suffix: str) -> Path:
    names = {"a.weight": f"m-00001-of-00002{suffix}", "b.bias": f"m-00002-of-00002{suffix}"}
    for key, name in names.items():
        part = {key: STATE[key]}
        if suffix == ".safetensors":
            save_file(part, folder / name)
        else:
            saved(folder / name, part)
    index = folder / f"diffusion_pytorch_model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": names}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path, suffix):
    index = sharded(tmp_path, suffix)
    opened = open_checkpoint(index)
    assert same(opened.state)
    assert len(opened.files) == 2
    assert find_weights(tmp_path) == index
    listing = subprocess.run(f"sha256sum m-*{suffix} | sha256sum", shell=True, cwd=tmp_path, capture_output=True)
    assert sha256(index) == listing.stdout.decode().split()[0]


def test_shards_that_lie(tmp_path):
    index = sharded(tmp_path, ".safetensors")
    good = json.loads(index.read_text())
    for changes, said in (
        ({"a.weight": "../m.safetensors"}, "not a file beside it"),
        ({"a.weight": "/etc/passwd"}, "not a file beside it"),
        ({"a.weight": "m-00003-of-00002.safetensors"}, "not beside it"),
        ({"c.weight": "m-00001-of-00002.safetensors"}, "holds c.weight, which it does not"),
    ):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | changes}))
        assert said in refusal(index)
    index.write_text("[]")
    assert "not a JSON object" in refusal(index)
    index.write_text("{}")
    assert "no weight_map" in refusal(index)


def test_diffusers_folder(tmp_path):
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer" / "config.json").write_text('{"sample_size": 32}')
    saved(tmp_path / "transformer" / "diffusion_pytorch_model.bin", STATE)
    save_file(STATE, tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(OTHER, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert same(opened.state)
    assert opened.path.name == "diffusion_pytorch_model.bin"
    assert opened.config == {"sample_size": 32}
    assert same(open_checkpoint(tmp_path, "vae").state, OTHER)
    assert companion(tmp_path) == str(tmp_path)
    assert companion(tmp_path / "vae") is None


def test_folders_without_an_answer(tmp_path):
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    assert "has no transformer/ (it has unet)" in refusal(tmp_path)
    (tmp_path / "model_index.json").unlink()
    for name in ("one.pth", "two.pth"):
        saved(tmp_path / name, STATE)
    assert "one.pth, two.pth" in refusal(tmp_path)


class Payload:
    """Runs a command when it is unpickled by a reader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
def test_code_in_a_pickle_does_not_run(tmp_path, how):
    marker, path = tmp_path / "was-run", tmp_path / "m.pth"
    value = {"a.weight": STATE["a.weight"], "x": Payload(marker)}
    if how == "bare":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        saved(path, value, _use_new_zipfile_serialization=how == "zip")
    text = refusal(path)
    assert not marker.exists()
    assert ("may run code" if how == "bare" else "posix.system") in text
    # The payload works: a reader without the guard runs it.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def repacked(path: Path, compression: int, **sizes: int) -> Path:
    """A torch file with its entries packed anew; `sizes` grows entries by that many zeros."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + b"\0" * sizes.get(entry.filename.rpartition("/")[2], 0))
    return path


def test_zip_bombs(tmp_path):
    assert open_checkpoint(repacked(tmp_path / "good.pth", zipfile.ZIP_STORED)).state
    bomb = repacked(tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED, **{"0": 50_000_000})
    assert bomb.stat().st_size < 100_000
    assert "would unpack to 50,0" in refusal(bomb)

    # Stored, but one entry's directory record claims more bytes than the file has.
    liar = repacked(tmp_path / "liar.pth", zipfile.ZIP_STORED)
    data = bytearray(liar.read_bytes())
    record = data.rfind(b"PK\x01\x02")
    struct.pack_into("<LL", data, record + 20, 1 << 30, 1 << 30)
    liar.write_bytes(data)
    assert "would unpack to 1,07" in refusal(liar)


def test_a_pickle_that_contains_itself(tmp_path):
    loop: dict = {"x": 1}
    loop.update(model=loop, ema=loop)
    assert "is no tensor" in refusal(saved(tmp_path / "m.pth", loop))
    loop["a"] = torch.ones(1)
    assert "nested too deeply" in refusal(saved(tmp_path / "m.pth", loop))


@pytest.mark.parametrize("kind", ["torch", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, kind, share):
    path, state = tmp_path / "m.pth", {"a.weight": torch.randn(64, 64), "b.bias": torch.randn(64)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        saved(path, state, _use_new_zipfile_serialization=kind == "torch")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\x00" * 100, "neither a torch file nor safetensors"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x04\x95", "may run code"),
        (b"\xff" * 8 + b"{}", "its header would have"),
        (struct.pack("<Q", 1 << 20) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (struct.pack("<Q", 9) + b'{"a": 1 }', "cannot be read as safetensors"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated or damaged"),
    ],
)
def test_other_things_than_checkpoints(tmp_path, data, said):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert said in refusal(path)


def test_other_archives(tmp_path):
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    assert "not one that torch wrote" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/constants.pkl", "x")
        archive.writestr("m/data.pkl", "x")
    assert "TorchScript" in refusal(path)
    assert "does not exist" in refusal(tmp_path / "nothing.pth")
    assert "'epoch' is no tensor" in refusal(saved(path, {"a": torch.ones(1), "epoch": 3}))
    assert "a key is 0" in refusal(saved(path, {0: torch.ones(1)}))
    assert "but a list" in refusal(saved(path, [torch.ones(1)]))
    assert "not a plain tensor" in refusal(saved(path, {"a": torch.ones(2, 2).to_sparse()}))


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_opening_reads_no_weights(tmp_path, kind):
    """Tensors are views of the mapped file: memory grows when they are used, not before."""
    path, size = tmp_path / "m", 64 << 20
    state = {"a.weight": torch.ones(size // 4)}
    if kind == "torch":
        saved(path, state)
    else:
        save_file(state, path)
    del state
    before = resident_bytes()
    opened = open_checkpoint(path)
    assert resident_bytes() - before < size // 4
    assert float(opened.state["a.weight"].sum()) == size / 4
    assert resident_bytes() - before > size * 3 // 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_sha256_sees_a_file_that_changed(tmp_path):
    path = tmp_path / "m"
    for content in (b"one", b"three"):
        path.write_bytes(content)
        assert sha256(path) == hashlib.sha256(content).hexdigest()
