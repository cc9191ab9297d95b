"""Fine-tuning as a stage of the pipeline: what a bundle says of it, what is refused, and being killed on the way."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from qexport import pipeline
from qexport import solve as solve_module
from qexport.bundle import Bundle
from qexport.distill import Distillation, DistillSettings, memory
from qexport.distill.least import least_bytes
from qexport.distill.tasks import TokenTask
from qexport.errors import InputError
from qexport.family import Generator
from qexport.quantize import assign_rules, places_of
from qexport.recipe import Recipe, Rule, recipe_for
from qexport.recipe_toml import read_recipe
from qexport.scheme import preset
from qexport.solution import Solution
from qexport.training import CONTROL, Training, fine_tune, method_of, prepare, require_trainable
from qexport.verify.images import open_images

SETTINGS = DistillSettings(
    steps=6, batch=16, lr=0.02, samples=48, held_out=16, evaluate_every=2, checkpoint_every=2
)  # fmt: skip
RECIPE = "w2"
NAME = f"tiny-{RECIPE}-topkld"


class KilledError(Exception):
    """What the tests end a run with."""


@pytest.fixture
def quantize(tiny: Generator, tiny_w2: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`qexport.pipeline.quantize` of the tiny model, in an empty folder."""
    monkeypatch.setattr(pipeline, "load_generator", lambda *given: tiny)
    monkeypatch.chdir(tmp_path)

    def call(training: Training | None = None, **options: Any) -> Bundle:
        return pipeline.quantize("tiny", recipe=tiny_w2, training=training or Training(SETTINGS), **options)

    return call


def images(path: Path, count: int, side: int = 6, labels: np.ndarray | None = None) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(count) % 10 if labels is None else labels)
    return path


def test_what_a_bundle_says_and_that_nothing_is_left_behind(quantize, tmp_path: Path) -> None:
    stages: list[str] = []
    bundle = quantize(progress=lambda stage, done, total: stages.append(stage))
    assert bundle.path == Path("qexport-out") / NAME
    assert [path.name for path in (tmp_path / "qexport-out").iterdir()] == [NAME]
    record = bundle.manifest.training
    assert record is not None
    want = {"method": "topkld", "loss": "split", "top_k": 900, "start_from": "mse", "graph": "step"}
    assert {name: record[name] for name in want} == want
    assert record["settings"]["steps"] == 6
    assert "48 samples that the full-precision model drew" in record["data"]
    assert {row["algorithm"] for row in bundle.manifest.layers} == {"mse+topkld", None}
    assert bundle.manifest.scheme == f"{RECIPE}-topkld"

    report = json.loads((bundle.reports / "training.json").read_text())
    assert len(report["losses"]) == 6
    assert report["best"] < report["start"]
    measured = {"start", "best", "best_step", "judged", "losses", "wall_s", "peak_memory_bytes"}
    assert measured <= set(report)
    assert not measured & set(record)  # the same input gives the same manifest
    trained = [stage for stage in stages if stage.startswith("train: ")]
    assert trained[-1] == f"train: loss {report['losses'][-1]:.4f}, held-out KL {report['judged'][-1][1]:.4f}"
    assert read_recipe(bundle.path / "recipe.toml").name == RECIPE  # replayed, it starts where this one did


@pytest.mark.parametrize("rest_lr", [0.0, 0.02])
def test_killed_and_resumed_gives_the_same_bundle(quantize, tmp_path: Path, rest_lr: float) -> None:
    quantize = partial(quantize, Training(replace(SETTINGS, rest_lr=rest_lr)))
    manifest = quantize(out=tmp_path / "whole").manifest
    whole, record = manifest.digest, manifest.training
    assert record is not None
    assert record["settings"].get("rest_lr", 0.0) == rest_lr
    assert bool(record.get("floats")) == (rest_lr > 0)

    def kill(stage: str, done: int, total: int) -> None:
        if stage.startswith("train") and done == 3:
            raise KilledError

    notes: list[str] = []
    with pytest.raises(KilledError):
        quantize(out=tmp_path / "cut", progress=kill, note=notes.append)
    assert not notes
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cut.training", "whole"]
    resumed = quantize(out=tmp_path / "cut", note=notes.append)
    assert notes == [f"going on after step 2 of 6 ({tmp_path / '.cut.training'})"]
    assert resumed.manifest.digest == whole
    assert json.loads((resumed.reports / "training.json").read_text())["resumed_after"] == 2  # wall_s is of the rest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_destination_that_is_taken_is_said_before_training(
    quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    monkeypatch.setattr("qexport.training.distill", lambda *given, **named: pytest.fail("it began to train"))
    with pytest.raises(InputError, match="taken: exists; choose another --out"):
        quantize(out=tmp_path / "taken")


def test_a_loss_that_is_no_number_leaves_no_bundle_and_keeps_the_checkpoint(
    quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_loss, calls = TokenTask.loss, []

    def sick(self, teacher, student, batch):
        calls.append(1)
        return true_loss(self, teacher, student, batch) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(TokenTask, "loss", sick)
    with pytest.raises(InputError, match=r"^distillation: the loss is nan at step 4; lower the rate \(lr 0.02\)"):
        quantize(out=tmp_path / "sick")
    assert [path.name for path in tmp_path.iterdir()] == [".sick.training"]


def test_it_learns_on_images(quantize, tiny: Generator, tmp_path: Path) -> None:
    path = images(tmp_path / "mine.npz", 20)
    told: list[tuple[str, int, int]] = []
    training = Training(replace(SETTINGS, loss=Distillation("forward")), path)
    bundle = quantize(training, out=tmp_path / "out", progress=lambda *given: told.append(given))
    record = bundle.manifest.training
    assert record is not None
    assert (record["method"], record["loss"], record["data"]) == ("forward", "forward", "20 images of mine.npz")
    assert "top_k" not in record
    assert record["settings"]["held_out"] == 4  # a fifth of the few that there are
    assert ("tokens", 20, 20) in told
    assert str(tmp_path) not in (bundle.path / "manifest.json").read_text()


def test_of_many_images_it_takes_as_many_as_it_looks_at(tiny: Generator, tiny_w2: Recipe, tmp_path: Path) -> None:
    training = Training(replace(SETTINGS, steps=2, batch=8, held_out=4), images(tmp_path / "mine.npz", 60))
    found = fine_tune(
        tiny, tiny_w2, Solution(), training, images=prepare(tiny, training), progress=lambda *given: None,
        note=lambda line: None,
    )  # fmt: skip
    assert found.record["data"] == "20 of 60 images of mine.npz, seed 0"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda at: at / "missing", "no such file or folder"),
        (lambda at: at, "has no subfolders"),
        (lambda at: (at / "0").mkdir() or at, "no images in its subfolders"),
        (lambda at: images(at / "one.npz", 1), "at least 2 are needed"),
        (lambda at: images(at / "none.npz", 0), "holds no images"),
        (lambda at: images(at / "label.npz", 3, labels=np.array([0, 1, 10])), "labels reach from 0 to 10"),
        (lambda at: (at / "bad.npz").write_bytes(b"PK nonsense") and at / "bad.npz", "cannot be read as .npz"),
    ],
)
def test_images_that_cannot_be_used_are_said_before_anything_slow(
    quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, says: str
) -> None:
    monkeypatch.setattr(pipeline, "decide", lambda *given: pytest.fail("it went on"))
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(InputError, match=says):
        quantize(Training(SETTINGS, make(folder)), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def encoded(kind: str, side: int = 6) -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test with it fails if anything is decided, calibrated or solved."""
    monkeypatch.setattr(pipeline, "decide", lambda *given: pytest.fail("it decided"))
    monkeypatch.setattr("qexport.solve.solve", lambda *given, **named: pytest.fail("it solved"))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.png", b"no picture", r"a\.png: not an image that can be read"),
        ("a.png", b"", r"a\.png: not an image that can be read"),
        ("a.png", encoded("PNG", 8), "is 8×8; this model takes 6×6"),
        ("a.jpg", encoded("JPEG", 8), "is 8×8; this model takes 6×6"),
        ("a.png", encoded("PNG")[:-30], r"a\.png: not an image that can be read"),  # cut short, its header sound
        ("a.jpg", encoded("JPEG")[:-30], r"a\.jpg: not an image that can be read"),
    ],
)
def test_a_bad_file_is_said_before_anything_is_solved(
    quantize, nothing_slow: None, tmp_path: Path, name: str, data: bytes, says: str
) -> None:
    cats = tmp_path / "folder" / "cats"
    cats.mkdir(parents=True)
    for i in range(3):
        (cats / f"good{i}.png").write_bytes(encoded("PNG"))
    (cats / name).write_bytes(data)
    with pytest.raises(InputError, match=says):
        quantize(Training(SETTINGS, tmp_path / "folder"), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("bad", [8, 0])
def test_a_bad_image_of_an_archive_is_said_before_anything_is_solved(
    quantize, nothing_slow: None, tmp_path: Path, bad: int
) -> None:
    if bad:
        with pytest.raises(InputError, match=r"is 8×8; this model takes 6×6"):
            quantize(Training(SETTINGS, images(tmp_path / "big.npz", 4, side=bad)), out=tmp_path / "out")
    files = [encoded("JPEG"), encoded("JPEG", bad) if bad else b"nothing", encoded("PNG")]
    ends = np.cumsum([0, *map(len, files)])
    data = np.frombuffer(b"".join(files), np.uint8)
    np.savez(tmp_path / "files.npz", data=data, off=ends, lab=np.arange(3))
    with pytest.raises(InputError, match="image 1 is 8×8" if bad else "image 1: not an image"):
        quantize(Training(SETTINGS, tmp_path / "files.npz"), out=tmp_path / "out")


def test_sound_files_are_looked_at_without_decoding(tiny: Generator, tmp_path: Path, monkeypatch) -> None:
    """Those with the end of a whole file; what other formats hold, and what has something behind, is decoded."""
    decoded: list[str] = []
    true_load = ImageFile.ImageFile.load

    def load(self):
        decoded.append(Path(self.fp.name).name)
        return true_load(self)

    folder = tmp_path / "cats"
    folder.mkdir()
    jpeg = encoded("JPEG")
    for name, data in {"a.png": encoded("PNG"), "b.jpg": jpeg, "c.bmp": encoded("BMP"), "d.jpg": jpeg + b"\0"}.items():
        (folder / name).write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    found = prepare(tiny, Training(SETTINGS, tmp_path))
    assert found is not None
    assert sorted(decoded) == ["c.bmp", "d.jpg"]


def test_of_a_big_folder_only_what_is_learned_on_is_looked_at(tiny: Generator, tmp_path: Path, monkeypatch) -> None:
    looked: list[int] = []
    held = images(tmp_path / "mine.npz", 60)
    true_open = open_images

    def seen(*given, **named):
        found = true_open(*given, **named)
        return replace(found, check=looked.append)

    monkeypatch.setattr("qexport.training.open_images", seen)
    few = Training(replace(SETTINGS, steps=2, batch=8, held_out=4), held)
    prepare(tiny, few)
    assert len(set(looked)) == len(looked) == 20


@pytest.mark.parametrize("known", [False, True], ids=["by the model alone", "by the recipe"])
def test_too_little_memory_is_said_before_anything_is_solved(
    quantize, tiny: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    bare = least_bytes(tiny, SETTINGS)
    monkeypatch.setattr(memory, "available_bytes", lambda: bare + 1000 if known else bare - 1)
    monkeypatch.setattr("qexport.solve.solve", lambda *given, **named: pytest.fail("it solved"))
    decided: list[object] = []
    monkeypatch.setattr(pipeline, "assign_rules", lambda *given: decided.append(given) or assign_rules(*given))
    with pytest.raises(InputError, match=r"^distillation needs at least .* GB, .* GB are free; make the batch smaller"):
        quantize(out=tmp_path / "out")
    assert bool(decided) == known
    assert not list(tmp_path.iterdir())


def test_memory_that_only_the_student_shows_is_still_said_later(
    quantize, tiny: Generator, tiny_w2: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[object] = []
    true_solve = solve_module.solve
    monkeypatch.setattr(solve_module, "solve", lambda *given, **named: solved.append(1) or true_solve(*given, **named))
    matrices = places_of(tiny, assign_rules(tiny, tiny_w2)).values()
    trained = sum(tiny.graph(graph).parameters()[name].numel() for graph, name in matrices)
    settings = replace(SETTINGS, batch=1600)
    least = least_bytes(tiny, settings, 1, trained)
    monkeypatch.setattr(memory, "available_bytes", lambda: least)
    with pytest.raises(InputError, match=r"^distillation needs about .* GB are free"):
        quantize(Training(settings), out=tmp_path / "out")
    assert solved


def test_a_denoiser_gets_the_control_and_no_choice_of_loss(dit: Generator, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2, batch=4, samples=20, held_out=8)
    recipe = recipe_for(preset(2), dit.default_layers, "w2", algorithm="mse")
    assert method_of(dit, Training(settings)) == CONTROL
    with pytest.raises(InputError, match=r"^--variant is about distributions of tokens; dit-c10-d2 draws none"):
        prepare(dit, Training(settings, loss_option="--variant"))
    with pytest.raises(InputError, match=r"dit-c10-d2 draws no tokens.*leave --data out"):
        prepare(dit, Training(settings, tmp_path))
    notes: list[str] = []
    found = fine_tune(dit, recipe, Solution(), Training(settings), progress=lambda *given: None, note=notes.append)
    assert [line for line in notes if "the control" in line] == notes != []
    assert (found.record["method"], found.record["loss"]) == (CONTROL, CONTROL)
    assert "top_k" not in found.record
    assert found.report["figure"] == "output_mse"


def test_a_recipe_with_nothing_to_train_is_refused(tiny: Generator) -> None:
    nothing = Recipe("kept", (Rule("blocks.*", None),))
    with pytest.raises(InputError, match="'kept' quantises no matrix of graph 'step' of tiny: nothing to train"):
        require_trainable(tiny, nothing)


def test_it_starts_from_gptq_unless_told_otherwise(quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def seen(generator, request, tell):
        asked.append(request.method.name)
        raise KilledError

    monkeypatch.setattr(pipeline, "decide", seen)
    for training in (Training(SETTINGS), None):
        with pytest.raises(KilledError):
            pipeline.quantize("tiny", scheme=preset(2), training=training)
    assert asked == ["gptq", "rtn"]
