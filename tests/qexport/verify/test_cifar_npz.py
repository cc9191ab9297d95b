"""benchmarks/cifar_npz.py: made-up batches of CIFAR-10's layout, read back by the code that the commands use."""

from __future__ import annotations

import os
import pickle
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from qexport.verify.images import open_images

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

cifar_npz = import_module("cifar_npz")

LABELS = ([3, 0, 9, 3], [1, 0])


def planes(label: int, number: int) -> np.ndarray:
    """Red says the class, green the number, blue rises along a row: no two planes or directions can be mixed up."""
    red, green = np.full(1024, 20 * label + 10), np.full(1024, 40 * number)
    blue = np.tile(np.arange(32) * 8, 32)
    return np.concatenate([red, green, blue]).astype(np.uint8)


@pytest.fixture
def batches(tmp_path) -> list[Path]:
    """Two files with keys of bytes, as Python 2 wrote them."""
    paths = []
    for batch, labels in enumerate(LABELS):
        data = np.stack([planes(label, 4 * batch + i) for i, label in enumerate(labels)])
        path = tmp_path / f"data_batch_{batch + 1}"
        path.write_bytes(pickle.dumps({b"data": data, b"labels": labels, b"batch_label": b"one"}, protocol=2))
        paths.append(path)
    return paths


def seen(path: Path) -> list[tuple[int, int, int]]:
    """(label, what red says of the class, what green says of the number) of each image; blue must rise to the right."""
    images = open_images(path, size=32, num_classes=10)
    found = []
    for i, label in enumerate(images.labels):
        pixels = images.load(i).astype(float)
        assert np.corrcoef(pixels[:, :, 2].mean(axis=0), np.arange(32))[0, 1] > 0.99
        assert np.ptp(pixels[:, :, 2].mean(axis=1)) < 30
        middle = pixels[8:24, 8:24].mean(axis=(0, 1))
        found.append((int(label), round((middle[0] - 10) / 20), round(middle[1] / 40)))
    return found


@pytest.mark.parametrize("pixels", [False, True])
def test_classes_follow_each_other_and_pixels_stay_where_they_were(tmp_path, batches, capsys, pixels):
    out = tmp_path / "cifar.npz"
    cifar_npz.main([*map(str, batches), "--out", str(out), *(["--pixels"] if pixels else [])])
    assert seen(out) == [(0, 0, 1), (0, 0, 5), (1, 1, 4), (3, 3, 0), (3, 3, 3), (9, 9, 2)]
    assert "6 images, 4 classes" in capsys.readouterr().out


def test_pixels_are_exact(tmp_path, batches):
    out = tmp_path / "cifar.npz"
    cifar_npz.main([str(batches[1]), "--out", str(out), "--pixels"])
    expected = planes(0, 5).reshape(3, 32, 32)
    np.testing.assert_array_equal(open_images(out, size=32, num_classes=10).load(0).transpose(2, 0, 1), expected)


@pytest.mark.parametrize(
    "content",
    [
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}),
        pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}),
    ],
)
def test_what_is_no_batch_is_refused(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="batch"):
        cifar_npz.read_batch(path)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": Harmful(), "labels": []}))
    with pytest.raises(SystemExit, match="mkdir"):
        cifar_npz.read_batch(path)
    assert not (tmp_path / "made-by-a-pickle").exists()
