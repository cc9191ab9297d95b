"""Whole runs: the loss falls, a run that is cut off ends where it would have, and what is written is a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from qexport_models.checkpoints import BUNDLED
from qexport_models.strict_load import build_strict
from qexport_models.train.command import main
from qexport_models.train.recipe import KINDS
from qexport_models.train.vqvae import RESTART_EVERY
from safetensors.torch import load_file

from qexport.distill import checkpoints as checkpoint_module
from qexport.errors import InputError
from qexport.family import find_model

FILES = {
    "vqvae": "vqvae-c10",
    "klvae": "klvae-c10",
    "featurenet": "featurenet",
    "var": "var-c10-d2",
    "dit": "dit-c10-d2",
}
FAST = {
    "vqvae": ("2", "6e-4"),
    "klvae": ("2", "6e-4"),
    "featurenet": ("8", "2e-3"),
    "var": ("4", "3e-3"),
    "dit": ("8", "3e-3"),
}
"""Batch and rate of the few steps that tests can afford."""


def arguments(kind: str, jpegs: Path, out: Path, steps: int, *more: str) -> list[str]:
    batch, rate = FAST[kind]
    given = [
        "--data",
        str(jpegs),
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--batch",
        batch,
        "--lr",
        rate,
        "--ema",
        "0.9",
    ]
    if kind == "featurenet":
        given[-1] = "0"  # running statistics of the norms belong to the weights as they are
    return [kind, *given, "--warmup", "0", *more]


def losses(out: Path) -> list[float]:
    (state,) = out.with_name(f"{out.name}.training").glob("*/training.pt")
    return torch.load(state, weights_only=True)["losses"]


@pytest.fixture(scope="module")
def trained(jpegs, tmp_path_factory):
    """Every kind, trained for a few steps from nothing."""
    folder, steps = tmp_path_factory.mktemp("trained"), {"vqvae": 4, "klvae": 4, "featurenet": 12, "var": 12, "dit": 40}
    for kind in KINDS:
        assert main(arguments(kind, jpegs, folder / f"{kind}.safetensors", steps[kind])) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(trained, kind):
    found = losses(trained / f"{kind}.safetensors")
    third = len(found) // 3
    assert sum(found[-third:]) < 0.9 * sum(found[:third])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_has_the_layout_of_the_bundled_file(trained, kind):
    found = load_file(trained / f"{kind}.safetensors")
    wanted = load_file(BUNDLED / f"{FILES[kind]}.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in wanted.items()
    }


def test_what_is_written_loads_strictly(trained):
    for name, vae in (("var-c10-d2", "vqvae"), ("dit-c10-d2", "klvae")):
        family, entry = find_model(name)
        kind = name.partition("-")[0]
        generator = family.load(entry, str(trained / f"{kind}.safetensors"), str(trained / f"{vae}.safetensors"))
        weight = generator.graphs[0].parameters()["blocks.0.attn.proj.weight"]
        written = load_file(trained / f"{kind}.safetensors")["blocks.0.attn.proj.weight"]
        assert torch.equal(weight, written.float())
    from qexport_models.featurenet import FeatureNet

    build_strict(FeatureNet, load_file(trained / "featurenet.safetensors"), "FeatureNet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_off_ends_where_it_would_have(jpegs, tmp_path, monkeypatch, kind):
    """Cut off while a checkpoint is being written, the second one: the first counts, and one step is done again."""
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    more = ("--checkpoint-every", "1")
    assert main(arguments(kind, jpegs, whole, 3, *more)) == 0
    saved = []
    write = torch.save

    def failing(state, path):
        saved.append(path)
        if len([p for p in saved if "training.pt" in str(p)]) == 2:
            raise KeyboardInterrupt
        write(state, path)

    monkeypatch.setattr(checkpoint_module.torch, "save", failing)
    assert main(arguments(kind, jpegs, cut, 3, *more)) == 130
    assert not cut.exists()
    assert len(losses(cut)) == 1
    assert main(arguments(kind, jpegs, cut, 3, *more)) == 0
    assert cut.read_bytes() == whole.read_bytes()
    other = tmp_path / "other.safetensors"
    assert main(arguments(kind, jpegs, other, 3, "--seed", "1")) == 0
    assert other.read_bytes() != whole.read_bytes(), "the seed counts"


@pytest.mark.slow
def test_a_killed_process_goes_on(jpegs, tmp_path):
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    command = [sys.executable, "-m", "qexport_models.train"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    more = ("--checkpoint-every", "5")
    assert main(arguments("dit", jpegs, whole, 60, *more)) == 0
    process = subprocess.Popen([*command, *arguments("dit", jpegs, killed, 60, *more)], env=environment)
    state = killed.with_name(f"{killed.name}.training")
    deadline = time.monotonic() + 120
    while not list(state.glob("*/training.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    assert 5 <= len(losses(killed)) < 60
    assert main(arguments("dit", jpegs, killed, 60, *more)) == 0
    assert killed.read_bytes() == whole.read_bytes()


def test_restarts_survive_a_checkpoint(jpegs, tmp_path):
    """The count of chosen codes is part of the state: without it, all codes would be restarted."""
    out = tmp_path / "out.safetensors"
    assert main(arguments("vqvae", jpegs, out, 2)) == 0
    (state,) = out.with_name(f"{out.name}.training").glob("*/training.pt")
    assert torch.load(state, weights_only=True)["task"]["hits"].sum() == 2 * 2 * 155
    assert RESTART_EVERY > 2


def test_going_on_from_the_bundled_weights_starts_at_their_loss(jpegs, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    init = str(BUNDLED / "klvae-c10.safetensors")
    assert main(arguments("klvae", jpegs, out, 0, "--init", init, "--judge", str(jpegs))) == 0
    assert "judged: loss 0.0" in capsys.readouterr().err  # 0.03 on test images; 1.4 from nothing
    assert (out.read_bytes() == (BUNDLED / "klvae-c10.safetensors").read_bytes()) or {
        name: t.tolist() for name, t in load_file(out).items() if t.ndim == 1
    } == {name: t.tolist() for name, t in load_file(init).items() if t.ndim == 1}


def test_bf16_trains_and_chooses_codes_in_float32(jpegs, tmp_path):
    out = tmp_path / "out.safetensors"
    assert main(arguments("var", jpegs, out, 2, "--bf16")) == 0
    exact = tmp_path / "exact.safetensors"
    assert main(arguments("var", jpegs, exact, 2)) == 0
    (prepared,) = out.with_name(f"{out.name}.training").glob("*/examples.pt")
    (same,) = exact.with_name(f"{exact.name}.training").glob("*/examples.pt")
    assert torch.equal(torch.load(prepared, weights_only=True)["plain"], torch.load(same, weights_only=True)["plain"])
    assert out.read_bytes() != exact.read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "absent.npz"], "absent.npz: no such file or folder"),
        (["--init", "absent.safetensors"], "--init absent.safetensors: no such file"),
        (["--init", str(BUNDLED / "dit-c10-d2.safetensors")], "checkpoint is not a VAR of depth 2"),
        (["--depth", "3", "--init", str(BUNDLED / "var-c10-d2.safetensors")], "checkpoint is not a VAR of depth 3"),
        (["--depth", "1"], "depth 1 is out of range; 2 … 12 can be trained"),
        (["--featurenet", "x"], "--featurenet means something for vqvae and klvae only"),
        (["--batch", "0"], "batch is 0; it must be at least 1"),
        (["--lr", "nan"], "lr is nan; it must be 0 or greater, and finite"),
        (["--ema", "1"], "ema is 1.0; it must lie in 0 … 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: must be at least 1"),
        (["--out", "/absent/x.safetensors"], "is a folder or lies in none"),
    ],
)
def test_bad_input_is_one_line(jpegs, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments("var", jpegs, tmp_path / "out.safetensors", 1), *more]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.glob("*.safetensors*"))


def test_divergence_is_said_and_nothing_is_written(jpegs, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(arguments("var", jpegs, out, 30, "--lr", "1e30", "--clip", "0")) == 2
    assert "lower --lr" in capsys.readouterr().err
    assert not out.exists()


def test_numbers_beyond_fp16_are_refused(tmp_path):
    from qexport_models.train.weights import save_weights

    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 1e5
    with pytest.raises(InputError, match="weight holds numbers that fp16 has not"):
        save_weights(layer, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())
