"""Images to score: every layout gives the same pixels, and what does not fit is said in one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qexport.errors import InputError
from qexport.verify.inception_images import open_pictures

COUNT = 5


@pytest.fixture
def pixels():
    return np.random.default_rng(2).integers(0, 256, (COUNT, 6, 8, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def as_folder(root: Path, pixels) -> Path:
    for i, image in enumerate(pixels):
        path = root / f"class{i // 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(png(image))
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    return root


def as_arrays(path: Path, pixels) -> Path:
    np.savez(path, arr_0=pixels, labels=np.zeros(COUNT))
    return path


def as_small_arrays(path: Path, pixels) -> Path:
    np.savez_compressed(path, images=pixels)
    return path


LAYOUTS = {"folder": as_folder, "a.npz": as_arrays, "i.npz": as_small_arrays}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2, COUNT, 50])
def test_every_layout_gives_the_same_pixels(tmp_path, pixels, name, batch):
    pictures = open_pictures([LAYOUTS[name](tmp_path / name, pixels)])
    assert (pictures.count, pictures.size, pictures.source) == (COUNT, (6, 8), name)
    for _ in range(2):  # they can be read again
        parts = list(pictures.batches(batch))
        assert max(map(len, parts)) == min(batch, COUNT)
        np.testing.assert_array_equal(np.concatenate(parts), pixels)


def test_encoded_images(tmp_path, pixels):
    square = pixels[:, :, :6]
    files = [png(image) for image in square]
    held = {"data": np.frombuffer(b"".join(files), np.uint8), "off": np.cumsum([0, *map(len, files)])}
    np.savez(tmp_path / "e.npz", **held, lab=np.array([3, 0, 1, 2, 9], np.uint8))
    pictures = open_pictures([tmp_path / "e.npz"])
    assert pictures.size == (6, 6)
    np.testing.assert_array_equal(np.concatenate(list(pictures.batches(2))), square)


def test_several_are_one_set(tmp_path, pixels):
    pictures = open_pictures([as_arrays(tmp_path / "a.npz", pixels), as_folder(tmp_path / "f", pixels[::-1])])
    assert (pictures.count, pictures.source) == (2 * COUNT, "a.npz and f")
    np.testing.assert_array_equal(np.concatenate(list(pictures.batches(3))), np.concatenate([pixels, pixels[::-1]]))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "images is float32"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, r"arr_0 is uint8 \(2, 4, 4\)"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "columns first"),
        ({"x": np.zeros(2)}, "holds x; images are"),
        ({"images": np.array([{}], object)}, "images is object"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=says):
        open_pictures([tmp_path / "a.npz"])


def test_files_that_are_no_images(tmp_path, pixels):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(png(pixels[0])[:40])
    (tmp_path / "text.npz").write_text("no archive")
    for name, says in {
        "empty": "no images in it",
        "broken": "not an image that can be read",
        "text.npz": "neither a folder nor an .npz",
        "absent": "no such file or folder",
    }.items():
        with pytest.raises(InputError, match=says):
            open_pictures([tmp_path / name])
    with pytest.raises(InputError, match="no images; name"):
        open_pictures([])


def test_images_of_several_sizes(tmp_path, pixels):
    folder = as_folder(tmp_path / "f", pixels)
    (folder / "class1" / "9.png").write_bytes(png(pixels[0][:, :5]))
    with pytest.raises(InputError, match=r"9\.png: is 5×6, the first of its folder 8×6"):
        list(open_pictures([folder]).batches(2))
    narrow = as_arrays(tmp_path / "n.npz", pixels[:, :, :4])
    with pytest.raises(InputError, match=r"n\.npz: images are 4×6, those of .*f 8×6"):
        open_pictures([folder, narrow])


def test_a_file_that_ends_early(tmp_path, pixels):
    path = as_small_arrays(tmp_path / "i.npz", pixels)
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes(200) + whole[260:])
    with pytest.raises(InputError, match="copy or download it again"):
        list(open_pictures([path]).batches(2))
