"""Images to calibrate on: which are drawn, what the recipe says of them, and that the same give the same scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_shared_aln

from qexport.calibration_data import chosen_of, of_recipe, on_images
from qexport.errors import InputError
from qexport.family import Generator
from qexport.methods import parse_method
from qexport.recipe import Calibration, CalibrationImages
from qexport.recipe_toml import read_recipe, recipe_text
from qexport.request import Request
from qexport.scheme import preset
from qexport.solve import solve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny() -> Generator:
    generator = tiny_shared_aln()
    return replace(generator, entry=replace(generator.entry, image_size=6))


def _npz(path: Path, count: int, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8)
    np.savez(path, images=pixels, labels=np.sort(np.arange(count) % 10))
    return path


def _folder(root: Path, npz: Path) -> Path:
    with np.load(npz) as file:
        for i, (pixels, label) in enumerate(zip(file["images"], file["labels"], strict=True)):
            folder = root / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


GPTQ = Request(preset(4, group_size=16), parse_method("gptq"), samples=8, seed=1)


def test_classes_take_turns() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2] * 3)
    chosen = chosen_of(labels, 19, 4)
    assert Counter(labels[chosen]) == {0: 8, 1: 8, 2: 3}
    assert len(set(chosen)) == 19
    assert not np.array_equal(chosen, chosen_of(labels, 19, 5))
    np.testing.assert_array_equal(chosen_of(labels, 1000, 4)[:19], chosen)
    assert sorted(chosen_of(labels, 1000, 4)) == list(range(103))


def test_a_recipe_says_what_was_shown_and_not_where_it_lies(tiny: Generator, tmp_path: Path) -> None:
    npz = _npz(tmp_path / "mine.npz", 20)
    recipe = on_images(tiny, GPTQ, npz).recipe(tiny)
    text = recipe_text(recipe)
    assert 'images = "mine.npz"' in text
    assert str(tmp_path) not in text
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    read = read_recipe(tmp_path / "r.toml")
    assert read == recipe
    images = recipe.calibration.images
    assert images is not None
    folder = on_images(tiny, GPTQ, _folder(tmp_path / "folder", npz)).images
    assert folder is not None
    assert (folder.name, folder.sha256) == ("folder", images.sha256)
    assert recipe.calibration.to_json() == {
        "samples": 8, "seed": 1, "schedule": None, "images": "mine.npz", "images_sha256": images.sha256,
    }  # fmt: skip
    assert Calibration(8).to_json() == {"samples": 8, "seed": 0, "schedule": None}


def test_the_same_images_and_seed_give_the_same_scales(tmp_path: Path) -> None:
    npz = _npz(tmp_path / "mine.npz", 20)
    found = []
    for seed, path in ((1, npz), (1, _folder(tmp_path / "folder", npz)), (2, npz), (1, None)):
        generator = tiny_shared_aln()
        generator = replace(generator, entry=replace(generator.entry, image_size=6))
        asked = replace(GPTQ, scheme=preset(8, 8), seed=seed)
        asked = on_images(generator, asked, path) if path else asked
        solution = solve(generator, asked.recipe(generator))
        found.append(
            b"".join(a.scale.tobytes() for a in solution.activations.values() if a.scale is not None)
            + b"".join(w.codes.tobytes() + w.scales.tobytes() for w in solution.weights.values())
        )
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_recipe_takes_its_own_images_only(tiny: Generator, tmp_path: Path) -> None:
    recipe = on_images(tiny, GPTQ, _npz(tmp_path / "mine.npz", 20)).recipe(tiny)
    images = recipe.calibration.images
    assert images is not None
    read = replace(recipe, calibration=replace(recipe.calibration, images=replace(images, load=None)))
    with pytest.raises(InputError, match=r"calibrated on images of 'mine\.npz'; say where they are"):
        of_recipe(tiny, read, None)
    bound = of_recipe(tiny, read, tmp_path / "mine.npz").calibration.images
    assert bound is not None
    assert bound.load is not None
    assert bound == images
    other = _npz(tmp_path / "other.npz", 20, seed=1)
    with pytest.raises(InputError, match=r"other\.npz: not the images that recipe 'w4a16-g16-gptq' was made with"):
        of_recipe(tiny, read, other)
    free = replace(read, calibration=replace(read.calibration, images=CalibrationImages("mine.npz")))
    taken = of_recipe(tiny, free, other).calibration.images
    assert taken is not None
    assert (taken.name, taken.sha256 == images.sha256) == ("other.npz", False)
    own = replace(read, calibration=Calibration(8))
    assert of_recipe(tiny, own, None) is own
    with pytest.raises(InputError, match="is calibrated on the model's own samples; leave it out, or write images = "):
        of_recipe(tiny, own, other)


def test_images_that_do_not_do_are_one_line(tiny: Generator, tmp_path: Path) -> None:
    npz = _npz(tmp_path / "few.npz", 5)
    with pytest.raises(InputError, match=r"few\.npz: holds 5 images; 8 samples were asked for"):
        on_images(tiny, GPTQ, npz)
    assert on_images(tiny, replace(GPTQ, samples=None), npz).samples == 5
    with pytest.raises(InputError, match="w4a16-g16 looks at no inputs; leave it out"):
        on_images(tiny, replace(GPTQ, method=parse_method("rtn")), npz)
    with pytest.raises(InputError, match="the family offers no encoder"):
        on_images(replace(tiny, quality=None), replace(GPTQ, samples=2), npz)
    with pytest.raises(InputError, match="is 6×6; this model takes 8×8"):
        on_images(replace(tiny, entry=replace(tiny.entry, image_size=8)), replace(GPTQ, samples=2), npz)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('images = ""', "key 'images' is ''"),
        ('images = "x"\nimages_sha256 = "12"', "must be 64 hexadecimal digits"),
        (f'images_sha256 = "{"0" * 64}"', "'images_sha256' has no meaning without 'images'"),
    ],
)
def test_wrong_keys(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'version = 1\nname = "x"\n[calibration]\n{lines}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_recipe(path)
