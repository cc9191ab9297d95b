"""Which images a step sees: every one once a pass, half of them mirrored, and the same whenever it is asked."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from qexport_models.train.data import Examples, prepared, read_images, step_generator, to_unit

from qexport.errors import InputError


def numbered(count: int) -> Examples:
    """Example i is the row (i, 100 + i): a flip exchanges the two."""
    first = torch.arange(count)
    return Examples(torch.stack([first, 100 + first], dim=1), first % 10)


def test_pixels_are_those_of_the_jpegs(jpegs):
    images, digest = read_images(jpegs)
    with np.load(jpegs) as file:
        one = Image.open(io.BytesIO(file["data"][file["off"][3] : file["off"][4]].tobytes()))
        assert np.array_equal(images.plain[3].numpy(), np.asarray(one).transpose(2, 0, 1))
        assert images.labels.tolist() == file["lab"].tolist()
    assert digest == read_images(jpegs)[1]


def test_range_of_pixels():
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_every_example_is_seen_once_a_pass():
    examples = numbered(30)
    seen = torch.cat([examples.batch(step, 8, seed=1)[0].min(dim=1).values for step in range(15)])
    for start in range(0, 120, 30):  # batches of 8 straddle the passes of 30
        assert sorted(seen[start : start + 30].tolist()) == list(range(30))
    assert seen[:30].tolist() != seen[30:60].tolist(), "each pass has an order of its own"


def test_labels_stay_with_their_examples():
    x, labels = numbered(30).batch(2, 16, seed=0)
    assert torch.equal(x.min(dim=1).values % 10, labels)


def test_half_is_mirrored():
    examples = numbered(30)
    flipped = torch.cat([examples.batch(step, 30, seed=0)[0][:, 0] >= 100 for step in range(40)])
    share = flipped.double().mean()
    assert abs(share - 0.5) < 4 * 0.5 / len(flipped) ** 0.5  # four standard errors


def test_a_step_depends_on_seed_and_number_alone():
    assert torch.equal(numbered(30).batch(7, 8, seed=3)[0], numbered(30).batch(7, 8, seed=3)[0])
    assert not torch.equal(numbered(30).batch(7, 8, seed=3)[0], numbered(30).batch(7, 8, seed=4)[0])
    draws = {float(torch.rand((), generator=step_generator(0, n))) for n in range(100)}
    assert len(draws) == 100


def test_what_an_encoder_makes_is_computed_of_both_sides():
    images = Examples(torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4), torch.tensor([0, 1]))
    found = prepared(images, lambda pixels: pixels[:, 0, 0, 0].long(), 1)
    assert found.plain.tolist() == [0, 48]
    assert found.mirrored is not None
    assert found.mirrored.tolist() == [3, 51]  # the right end of the first row


def test_images_of_another_size_are_refused(tmp_path):
    path = tmp_path / "large.npz"
    np.savez(path, images=np.zeros((2, 64, 64, 3), np.uint8), labels=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="64×64; this model takes 32×32"):
        read_images(path)
