"""Teacher forcing through the plan, the quality figures, FD, and images as input."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qexport.errors import InputError
from qexport.family import Generator
from qexport.numerics.metrics import relative_l2
from qexport.reference.backend import torch_player
from qexport.reference.forced import forced_logits
from qexport.runtime import load
from qexport.verify.fd import measure_fd
from qexport.verify.images import open_images
from qexport.verify.quality import drawn_by, measure_quality, runtime_student, torch_student


def test_forced_draws_give_the_teacher_forced_logits(generator: Generator) -> None:
    assert generator.quality is not None
    assert generator.draw is not None
    labels = np.array([1, 8])
    tokens = np.random.default_rng(0).integers(0, 4096, (2, 155))
    forced = forced_logits(torch_player(generator), generator.draw, labels, tokens, generator.tables)
    wanted = generator.quality.teacher_forced_logits(torch.from_numpy(labels), torch.from_numpy(tokens))
    assert [part.shape[1] for part in forced] == [1, 4, 9, 16, 25, 36, 64]
    assert relative_l2(np.concatenate(forced, axis=1), wanted.numpy()) <= 2e-6


def test_a_model_agrees_with_itself(generator: Generator) -> None:
    found = measure_quality(
        generator, torch_student(generator), drawn_by(generator, 3, 0, 2), on_images=False, seed=0, source=""
    )
    assert found.samples == 3
    assert found.figures == {"kl": 0.0, "top1_agreement": 1.0, "top900_agreement": 1.0}


def test_samples_do_not_depend_on_the_batch(generator: Generator) -> None:
    whole = np.concatenate([tokens for _, tokens in drawn_by(generator, 3, 5, 3)])
    parts = np.concatenate([tokens for _, tokens in drawn_by(generator, 3, 5, 1)])
    assert (whole == parts).mean() > 0.99  # kernels of other batch sizes may flip a draw


def test_exact_and_serve_differ_as_their_options_say(sound_bundle: Path, generator: Generator) -> None:
    assert generator.draw is not None
    labels, tokens = next(drawn_by(generator, 2, 0, 2))
    logits = {}
    for options in ("exact", "serve"):
        runtime = load(sound_bundle, "cpu", options)
        student = runtime_student(runtime.player, generator.draw, runtime.bundle.tables())
        logits[options] = np.concatenate(student(labels, tokens), axis=1)
    error = relative_l2(logits["serve"], logits["exact"])
    assert 1e-4 < error < 0.1, "serve quantises activations to int8 (accuracy level 4)"


class Identity:
    """Features are the image itself; the real ones are standard normal."""

    name = "identity"
    mu = np.zeros(3)
    cov = np.eye(3)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_fd_of_shifted_normals_is_the_squared_shift() -> None:
    images = np.random.default_rng(0).standard_normal((4000, 3, 1, 1), np.float32) + np.float32(1.0)
    found = measure_fd([images[:1500], images[1500:]], Identity(), seed=0)
    assert found.images == 4000
    assert found.value == pytest.approx(3.0, abs=0.25)
    assert found.low < 3.0 < found.high
    assert found.high - found.low < 0.6


def test_fd_needs_two_images() -> None:
    with pytest.raises(InputError, match="at least 2"):
        measure_fd([np.zeros((1, 3, 1, 1), np.float32)], Identity(), seed=0)


def encoded(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def test_the_three_ways_to_give_images_agree(pixels: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", images=pixels, labels=np.arange(5))
    files = [encoded(p) for p in pixels]
    off = np.cumsum([0, *(len(f) for f in files)])
    data = np.frombuffer(b"".join(files), np.uint8)
    np.savez(tmp_path / "files.npz", data=data, off=off, lab=np.arange(5, dtype=np.uint8))
    for i, file in enumerate(files):
        (tmp_path / "folder" / f"class{i}").mkdir(parents=True)
        (tmp_path / "folder" / f"class{i}" / "a.png").write_bytes(file)
    for name in ("plain.npz", "files.npz", "folder"):
        images = open_images(tmp_path / name, size=32, num_classes=10, every=2)
        (found, labels), (last, _) = images.batches(2)
        assert labels.tolist() == [0, 2]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, pixels[[0, 2]].transpose(0, 3, 1, 2) / np.float32(255))
        assert len(images) == 3
        assert len(last) == 1


def test_wrong_images_are_refused_in_one_line(pixels: np.ndarray, tmp_path: Path) -> None:
    def complaint(path: Path, **options: int) -> str:
        with pytest.raises(InputError) as caught:
            list(open_images(path, **{"size": 32, "num_classes": 10, **options}).batches(4))
        message = str(caught.value)
        assert "\n" not in message
        return message

    np.savez(tmp_path / "good.npz", images=pixels, labels=np.arange(5))
    np.savez(tmp_path / "labels.npz", images=pixels, labels=np.arange(5) + 8)
    np.savez(tmp_path / "float.npz", images=pixels / 255, labels=np.arange(5))
    np.savez(tmp_path / "fewer.npz", images=pixels, labels=np.arange(4))
    np.savez(tmp_path / "names.npz", pictures=pixels)
    np.savez(tmp_path / "cut.npz", data=np.zeros(10, np.uint8), off=np.array([0, 5, 99]), lab=np.zeros(2, int))
    np.savez(tmp_path / "junk.npz", data=np.zeros(10, np.uint8), off=np.array([0, 5, 10]), lab=np.zeros(2, int))
    np.savez(tmp_path / "pickle.npz", images=np.array([{}]), labels=np.arange(1))
    np.save(tmp_path / "array.npy", pixels)
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "a").mkdir(parents=True)
    assert "no such file" in complaint(tmp_path / "none.npz")
    assert "this model takes 64×64" in complaint(tmp_path / "good.npz", size=64)
    assert "at least 1" in complaint(tmp_path / "good.npz", every=0)
    assert "0 … 9" in complaint(tmp_path / "labels.npz")
    assert "uint8" in complaint(tmp_path / "float.npz")
    assert "one a label" in complaint(tmp_path / "fewer.npz")
    assert "needed are" in complaint(tmp_path / "names.npz")
    assert "does not cut" in complaint(tmp_path / "cut.npz")
    assert "not an image" in complaint(tmp_path / "junk.npz")
    assert "cannot be read" in complaint(tmp_path / "pickle.npz")
    assert "single array" in complaint(tmp_path / "array.npy")
    assert "cannot be read" in complaint(tmp_path / "text.npz")
    assert "no subfolders" in complaint(tmp_path / "empty")
    assert "no images" in complaint(tmp_path / "bare")
