"""`qexport generate`: the pictures are what the bundle computes, whole or not at all, and the same every time.

What holds of sameness: the same command gives the same bytes. With another --batch the noise of every image is the
same, but kernels may round otherwise; the toy bundle, whose arithmetic does not depend on the batch, shows the former,
and the real one is held to "nearly all pixels equal".
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from qexport_cli.options import parse_classes

TOY_SCALE = 64  # images of 2 × 2 pixels are enlarged to 128


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_grid_shows_what_the_bundle_computes(run, toy, tmp_path):
    import toy_bundle

    out = tmp_path / "new" / "grid.png"
    outcome = run("generate", toy, "--classes", "1,3", "--n", "5", "--seed", "9", "--set", "gain=0.5", "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert str(out) in outcome.out
    expected = toy_bundle.expected([1, 3, 1, 3, 1], seed=9, gain=0.5)
    grid = pixels(out)
    side = 2 * TOY_SCALE
    assert grid.shape == (2 * side + 2, 3 * side + 2 * 2, 3)
    for i, image in enumerate(expected):
        top, left = i // 3 * (side + 2), i % 3 * (side + 2)
        shown = grid[top : top + side : TOY_SCALE, left : left + side : TOY_SCALE]
        # float32 against float64: a value may lie on the other side of a rounding boundary
        np.testing.assert_allclose(shown, image.transpose(1, 2, 0) * 255, atol=0.5 + 1e-3)
    assert (grid[:, side : side + 2] == 255).all()  # the gap
    assert (grid[side + 2 :, 2 * (side + 2) :] == 255).all()  # no sixth image


def test_separate_files_and_texts(run, toy, tmp_path):
    folder = tmp_path / "single"
    out = tmp_path / "grid.png"
    outcome = run(
        "generate", toy, "--classes", "0-2", "--n", 4, "--scale", 1, "--out", out, "--separate", folder, "--json"
    )
    data = json.loads(outcome.out)
    names = ["00000-class0.png", "00001-class1.png", "00002-class2.png", "00003-class0.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert data["separate"] == [str(folder / name) for name in names]
    assert data["classes"] == [0, 1, 2, 0]
    grid = pixels(out)
    assert grid.shape == (6, 6, 3)
    np.testing.assert_array_equal(pixels(folder / names[1]), grid[:2, 4:])
    with Image.open(out) as image:
        texts = image.text
    assert texts["model"] == "toy"
    assert texts["seed"] == "0"
    assert texts["classes"] == "0,1,2,0"
    assert "gain=1" in texts["settings"]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_same_images_in_any_batch(run, toy, tmp_path, batch):
    run("generate", toy, "--n", "6", "--out", tmp_path / "a.png")
    run("generate", toy, "--n", "6", "--out", tmp_path / "b.png", "--batch", batch)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_another_seed_is_another_image(run, toy, tmp_path):
    run("generate", toy, "--n", "6", "--out", tmp_path / "a.png", "--set", "gain=0.1")
    run("generate", toy, "--n", "6", "--out", tmp_path / "b.png", "--set", "gain=0.1", "--seed", "1")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_real_model(run, var, tmp_path):
    for name, batch in (("a", 16), ("b", 16), ("c", 3)):
        assert (
            run("generate", var, "--n", 6, "--seed", 5, "--batch", batch, "--out", tmp_path / f"{name}.png").code == 0
        )
    first, second, third = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second
    a, c = pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png")
    assert a.shape == (2 * 128 + 2, 3 * 128 + 4, 3)
    assert len(np.unique(a)) > 100  # pictures, not blanks
    assert np.mean(a != c) < 0.5
    assert third


def test_options_reach_the_model(run, var, tmp_path):
    def grid(*arguments):
        out = tmp_path / "x.png"
        assert run("generate", var, "--n", "1", "--out", out, *arguments).code == 0
        return pixels(out)

    default = grid()
    np.testing.assert_array_equal(grid("--cfg", 1.5, "--top-k", 900, "--top-p", 0.96, "--temperature", 1), default)
    for arguments in (("--cfg", 6), ("--top-k", 1), ("--top-p", 0.1), ("--temperature", 3), ("--set", "cfg=6")):
        assert (grid(*arguments) != default).any(), arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--classes", "4"], "no class 4; it has 0 to 3"),
        (["--classes", "1,two"], "'two' is not a class number"),
        (["--classes", "-1"], "not a class number"),
        (["--classes", "3-1"], "runs backwards"),
        (["--classes", ""], "not a class number"),
        (["--set", "gian=1"], "did you mean 'gain'"),
        (["--set", "gain"], "write name=number"),
        (["--set", "gain=big"], "'big' is not a number"),
        (["--set", "gain=1", "--set", "gain=2"], "given twice"),
        (["--set", "gain=-1"], "at least 0"),
        (["--set", "label=1"], "--classes"),
        (["--set", "seed=1"], "unknown input 'seed'"),
        (["--cfg", "2"], "unknown input 'cfg'"),
        (["--cfg", "2", "--set", "cfg=2"], "option of its own"),
        (["--provider", "tpu"], "tpu"),
        (["--out", "grid.jpg"], "must end in .png"),
        (["--out", "folder.png"], "is a folder"),
        (["--out", "file/grid.png"], "file"),
        (["--separate", "file"], "is a file"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(run, toy, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    outcome = run("generate", toy, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_no_bundle(run, tmp_path):
    assert "no such folder" in run("generate", tmp_path / "missing").error
    assert "not a bundle" in run("generate", tmp_path).error


def test_a_full_disk_keeps_the_old_picture(run, toy, mounted):
    folder = mounted("size=8k,nr_inodes=20")
    out = folder / "grid.png"
    assert run("generate", toy, "--n", 1, "--out", out, "--scale", 1).code == 0
    before = out.read_bytes()
    (folder / "filler").write_bytes(bytes(4096))
    outcome = run("generate", toy, "--n", 2, "--out", out)
    assert outcome.code == 2
    assert "no space left" in outcome.error
    assert out.read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["filler", "grid.png"]


def test_an_error_while_writing_keeps_the_old_picture(run, toy, tmp_path, monkeypatch):
    out = tmp_path / "grid.png"
    out.write_bytes(b"old")

    def fail(image, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    outcome = run("generate", toy, "--out", out)
    assert (outcome.code, outcome.error) == (2, "error: no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert out.read_bytes() == b"old"


def test_classes():
    assert parse_classes("1, 8", 10) == [1, 8]
    assert parse_classes("7-9,0,7", 10) == [7, 8, 9, 0, 7]
    assert parse_classes("0-0", 1) == [0]


def test_cuda_graphs_without_cuda_are_one_line(run, toy, tmp_path):
    outcome = run("generate", toy, "--cuda-graphs", "--provider", "cpu", "--out", tmp_path / "grid.png")
    assert outcome.code == 2
    assert outcome.err.strip() == "error: CUDA graphs need CUDA, and the provider is cpu; leave them out"
    assert not (tmp_path / "grid.png").exists()
