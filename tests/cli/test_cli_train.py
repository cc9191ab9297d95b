"""`--topkld` on models small enough to train in a test: settings without an option, and what ends a run in one line."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from qexport_cli.quantize_choice import choose
from qexport_cli.quantize_train import parse_train
from support import CHECKPOINTS
from tiny_models import tiny_llamagen

from qexport import pipeline
from qexport.bundle import Bundle
from qexport.distill import DistillSettings
from qexport.distill.tasks import TokenTask
from qexport.distill.trainer import Trainer
from qexport.errors import InputError
from qexport.family import Generator
from qexport.training import LEAST_HELD_OUT

sys.path.insert(0, str(Path(__file__).parents[1] / "qexport" / "distill"))  # the tiny VAR lies there

PLAIN = (
    "quantize", "--model", "tiny", "--wbits", "2", "--method", "mse", "--topkld", "--steps", "4", "--batch", "4",
    "--train", "evaluate_every=1",
)  # fmt: skip
TRAIN = (*PLAIN, "--train", "samples=12", "--train", "held_out=4")
NAME = "tiny-w2a16-mse-topkld"


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Generator]]:
    from tiny_var import tiny_var  # pyright: ignore[reportMissingImports]  # found by the line above

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {"tiny": tiny_var(), "llamagen-tiny": tiny_llamagen()}
    torch.set_num_threads(threads)


@pytest.fixture
def small(models: dict[str, Generator], run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line in an empty folder, where models have the names of the small ones."""
    monkeypatch.setattr(pipeline, "load_generator", lambda name, *given: models[name])
    monkeypatch.chdir(tmp_path)
    return run


def options(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--train", pair)]


def images(path: Path, count: int, side: int = 6) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(count) % 10)
    return path


def test_every_setting_is_within_reach() -> None:
    """Each field of `DistillSettings` has an option of its own or can be given with ``--train``."""
    own = {"loss", "steps", "batch", "lr", "seed"}
    pairs = {
        "scale_lr": "0.1", "rest_lr": "0.003", "warmup": "3", "clip": "2", "ema": "0.5", "scale_weights": "1,0.5",
        "samples": "9", "held_out": "2", "per_trajectory": "4", "unconditional": "0", "evaluate_every": "7",
        "patience": "2",
        "checkpoint_every": "8", "recompute": "true", "cached": "true", "sharded": "true", "bf16": "true",
        "offload": "true",
    }  # fmt: skip
    assert set(pairs) | own == set(DistillSettings.__dataclass_fields__)
    found = parse_train(f"{name}={text}" for name, text in pairs.items())
    assert found["scale_weights"] == (1.0, 0.5)
    assert (found["clip"], found["samples"], found["bf16"]) == (2.0, 9, True)
    defaults = DistillSettings()
    assert not [name for name, value in found.items() if value == getattr(defaults, name)]
    assert [type(found[name]) for name in ("clip", "samples")] == [float, int]


def test_a_switch_may_stand_alone_and_a_name_may_have_hyphens() -> None:
    assert parse_train(["recompute", "bf16=false", " held-out = 8 "]) == {
        "recompute": True, "bf16": False, "held_out": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train", "ema=0.5"], "--train belongs to --topkld, which fine-tunes; add --topkld or leave it out"),
        (["--topkld", *options("emma=0.5")], "--train 'emma' is unknown; did you mean 'ema'"),
        (["--topkld", *options("steps=10")], "--train steps=10: has an option of its own, --steps"),
        (["--topkld", *options("top-k=10")], "--train top-k=10: has an option of its own, --top-k"),
        (["--topkld", *options("loss=js")], "has an option of its own, --variant"),
        (["--topkld", *options("ema=0.5", "ema=0.6")], "--train ema: given twice"),
        (["--topkld", *options("ema")], "--train ema=: '' is not a number"),
        (["--topkld", *options("recompute=yes")], "--train recompute=yes: 'yes' is not true or false"),
        (["--topkld", *options("warmup=1.5")], "--train warmup=1.5: '1.5' is not an integer"),
        (["--topkld", *options("scale_weights=1,,2")], "'1,,2' is not a list of numbers such as 1,0.5,2"),
        (["--topkld", *options("ema=nan")], "distillation: ema is nan; it must lie in 0 … 1, 1 excluded"),
        (["--topkld", *options("warmup=800")], "distillation: warmup takes 800 of 800 steps"),
        (["--topkld", *options("samples=4", "held_out=4")], "4 samples, 4 held out: nothing to train on"),
        (["--topkld", *options("offload", "sharded")], "offload and sharded exclude each other"),
        (["--topkld", *options("boost=2")], "--train boost belongs to --variant boosted; leave it out with"),
        (["--topkld", *options("samples=99"), "--data", "x"], "--train samples counts what the model draws itself"),
        (["--topkld", *options("per_trajectory=5")], "per_trajectory is about denoisers; tiny draws tokens"),
        (["--topkld", *options("scale_weights=1,2")], "scale weights (1.0, 2.0): 3 numbers of at least 0 are needed"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_slow(small, tmp_path, monkeypatch, arguments, says) -> None:
    monkeypatch.setattr(pipeline, "decide", lambda *given: pytest.fail("it went on"))
    outcome = small("quantize", "--model", "tiny", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.error
    assert not list(tmp_path.iterdir())


def test_a_batch_that_processes_cannot_share_is_said_at_once(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "decide", lambda *given: pytest.fail("it went on"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "a batch of 4 cannot be shared by 3 processes; make it a multiple of 3" in small(*TRAIN).error
    assert not list(tmp_path.iterdir())


def test_a_boost_reaches_the_loss() -> None:
    chosen = choose({}, None, {"--topkld": True, "--variant": "boosted", "--train": ["boost=2.5"]})
    assert chosen.training is not None
    assert chosen.training.settings.loss.boost == 2.5


def test_settings_reach_the_manifest(small, tmp_path) -> None:
    extra = options("ema=0.5", "recompute", "warmup=1", "scale_weights=1,1,2")
    outcome = small(*TRAIN, *extra)
    assert (outcome.code, outcome.err) == (0, "")
    assert "split, K 900, 4 steps of 4, mean of decay 0.5, from mse" in " ".join(outcome.out.split())
    bundle = Bundle.open(tmp_path / "qexport-out" / NAME)
    record = bundle.manifest.training
    assert record is not None
    want = {"ema": 0.5, "recompute": True, "warmup": 1, "scale_weights": [1.0, 1.0, 2.0], "samples": 12, "held_out": 4}
    assert {name: record["settings"][name] for name in want} == want


def test_killed_and_resumed_with_settings_gives_the_same_bundle(small, tmp_path, monkeypatch) -> None:
    arguments = (*TRAIN, *options("ema=0.5", "checkpoint_every=1", "cached", "offload"))
    assert small(*arguments, "--out", "whole").code == 0
    update = Trainer._update

    def killed(self, model):
        if self._step == 2:
            raise KeyboardInterrupt
        return update(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", killed)
        assert small(*arguments, "--out", "cut").error == "interrupted"
    resumed = small(*arguments, "--out", "cut")
    assert (resumed.code, resumed.error) == (0, "going on after step 2 of 4 (.cut.training)")
    whole, cut = (Bundle.open(tmp_path / name).manifest.digest for name in ("whole", "cut"))
    assert whole == cut
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cut", "whole"]


def test_it_stops_early_and_says_so(small, tmp_path, monkeypatch) -> None:
    """Judgements that only rise: the second one after the start ends it, and the start is what is kept."""
    figures = iter(range(1, 10))
    monkeypatch.setattr(
        TokenTask, "judge", lambda self, teacher, student: torch.tensor([float(next(figures)), 1.0]).double()
    )
    outcome = small(*TRAIN, *options("patience=2"))
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    assert "2 steps of 4 (stopped early, of 4)" in text
    assert "no better, so the start is kept" in text
    report = json.loads((tmp_path / "qexport-out" / NAME / "reports" / "training.json").read_text())
    assert (report["steps"], len(report["losses"]), report["best_step"]) == (2, 2, 0)


def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_checkpoint(small, tmp_path, monkeypatch) -> None:
    true_loss, calls = TokenTask.loss, []

    def sick(self, teacher, student, batch):
        calls.append(1)
        return true_loss(self, teacher, student, batch) * (math.nan if len(calls) > 2 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTask, "loss", sick)
        outcome = small(*TRAIN, *options("checkpoint_every=1"), "--out", "b")
    assert outcome.code == 2
    # Without --lr the rate is 0.017 of the layers' mean error, which at 2 bits is some tenths.
    said = r"the loss is nan at step 3; lower the rate \(lr 0\.00\d+\); the last checkpoint is in \.b\.training"
    assert re.search(said, outcome.error)
    assert [entry.name for entry in tmp_path.iterdir()] == [".b.training"]
    again = small(*TRAIN, *options("checkpoint_every=1"), "--out", "b")  # nothing was lost
    assert (again.code, again.error) == (0, "going on after step 2 of 4 (.b.training)")


def test_too_little_memory_is_one_line_before_the_first_step(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("qexport.distill.memory.available_bytes", lambda: 1000)
    monkeypatch.setattr(Trainer, "run", lambda *given: pytest.fail("it began to train"))
    outcome = small(*TRAIN, "--out", "b")  # by what shapes tell, before calibration
    assert outcome.code == 2
    assert "distillation needs at least" in outcome.error
    monkeypatch.setattr("qexport.training.least_bytes", lambda *given: 0)
    outcome = small(*TRAIN, "--out", "b")  # by what the student was measured to take
    assert outcome.code == 2
    assert "distillation needs about" in outcome.error
    assert "--batch" in outcome.error
    assert "--train recompute" in outcome.error
    assert not (tmp_path / "b").exists()


def test_a_teacher_of_another_model_is_one_line(small, tmp_path, monkeypatch) -> None:
    """It cannot come about by options, since the teacher is the model itself: so a family is at fault here."""
    predictor, asked = TokenTask.predictor, []

    def wrong(self, generator):
        asked.append(generator)
        predict = predictor(self, generator)
        return predict if len(asked) < 3 else lambda *batch: predict(*batch)[..., 1:]

    monkeypatch.setattr(TokenTask, "predictor", wrong)
    outcome = small(*TRAIN, "--out", "b")
    assert outcome.code == 2
    assert "they are not the same model" in outcome.error
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_of_another_model_is_one_line(run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = CHECKPOINTS / "var-c10-d2.safetensors"
    outcome = run("quantize", "--model", "var-c10-d3", "--checkpoint", file, "--topkld")
    assert outcome.code == 2
    assert "is not var-c10-d3" in outcome.error
    assert not list(tmp_path.iterdir())


def _folder(at: Path, *names: str) -> str:
    (at / "in" / "cats").mkdir(parents=True)
    for name in names:
        (at / "in" / "cats" / name).write_bytes(b"no picture")
    return "in"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda at: "missing", "missing: no such file or folder"),
        (lambda at: _folder(at), "in: no images in its subfolders"),
        (lambda at: _folder(at, "a.png", "b.png"), ".png: not an image that can be read"),
        (lambda at: images(at / "one.npz", 1).name, "at least 2 are needed"),
        (lambda at: images(at / "big.npz", 4, side=8).name, "is 8×8; this model takes 6×6"),
        (lambda at: (at / "bad.npz").write_bytes(b"PK") and "bad.npz", "bad.npz: cannot be read as .npz"),
    ],
)
def test_images_that_cannot_be_used_are_one_line(small, tmp_path, make, says) -> None:
    outcome = small(*PLAIN, "--data", make(tmp_path), "--out", "b")
    assert outcome.code == 2
    assert says in outcome.error
    assert not (tmp_path / "b").exists()


def test_of_images_a_fifth_is_held_out(small, tmp_path) -> None:
    outcome = small(*PLAIN, "--data", images(tmp_path / "mine.npz", 6).name, "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)["training"]
    assert (told["settings"]["held_out"], told["data"]) == (LEAST_HELD_OUT, "6 images of mine.npz")


def test_an_autoregressive_model_is_trained_and_exported(small, tmp_path) -> None:
    """LlamaGen: all tokens of an image are one scale, and graph and loss are those of any model that draws tokens.

    KL falls by 3 % in four steps (0.855 to 0.831); without updates the start would be the best.
    """
    arguments = [part if part != "tiny" else "llamagen-tiny" for part in TRAIN]
    outcome = small(*arguments, "--lr", "0.02", "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)["training"]
    assert (told["graph"], told["figure"], told["steps"]) == ("token", "kl", 4)
    assert told["best_step"] > 0
    assert told["best"] < 0.99 * told["start"]
    bundle = tmp_path / "qexport-out" / "llamagen-tiny-w2a16-mse-topkld"
    assert {row["algorithm"] for row in Bundle.open(bundle).manifest.layers} == {"mse+topkld", None}
    outcome = small("verify", str(bundle), "--samples", "4", "--json")
    assert outcome.code == 0, outcome.err


def test_a_model_whose_blocks_cannot_be_computed_again_is_one_line(small, tmp_path) -> None:
    arguments = [part if part != "tiny" else "llamagen-tiny" for part in TRAIN]
    outcome = small(*arguments, *options("recompute"), "--out", "b")
    assert outcome.code == 2
    assert "recompute: llamagen-tiny does not call its blocks as modules when it is taught" in outcome.error
    assert not (tmp_path / "b").exists()


def test_an_autoregressive_model_has_no_weights_of_scales(small) -> None:
    outcome = small("quantize", "--model", "llamagen-tiny", "--topkld", *options("scale_weights=1,2"))
    assert outcome.code == 2
    assert "scale weights (1.0, 2.0): 1 numbers of at least 0 are needed" in outcome.error


def test_parse_train_says_what_it_knows() -> None:
    with pytest.raises(InputError, match=r"one of scale_lr, rest_lr, warmup, clip"):
        parse_train(["zzz=1"])
