"""What is put on the shelf comes back bit for bit, takes up no more than it must, and is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qexport.calibrate import RecordedCall, Shelf
from qexport.calibrate.shelf import is_stand_in, stand_in
from qexport.errors import InputError


def _calls() -> tuple[RecordedCall, ...]:
    shared, base = torch.randn(2, 3), torch.randn(4, 5)
    first = {"a": shared, "t": base.T, "part": base[1:3], "flag": torch.tensor([True, False]), "n": torch.tensor(7)}
    second = {"a": shared, "past": stand_in(torch.ones(2, 8, 4)), "none": stand_in(torch.ones(2, 0, 4))}
    return RecordedCall("g", 3, first), RecordedCall(
        "h", None, {**second, "one": torch.zeros(1), "same": base.view(20)}
    )


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    want, shelf = _calls(), Shelf(tmp_path / "deep" / "shelf")
    assert not shelf.holds("x")
    shelf.put("x", want)
    assert shelf.holds("x")
    got = shelf.get("x")
    assert [(call.graph, call.step, list(call.feeds)) for call in got] == [
        (call.graph, call.step, list(call.feeds)) for call in want
    ]
    for ours, theirs in zip(got, want, strict=True):
        for port, x in theirs.feeds.items():
            assert ours.feeds[port].dtype == x.dtype
            assert torch.equal(ours.feeds[port], x), port
    assert is_stand_in(got[1].feeds["past"])
    shelf.put("y", got)  # what is mapped can be written again
    assert torch.equal(shelf.get("y")[0].feeds["t"], want[0].feeds["t"])
    shelf.drop("x")
    shelf.drop("x")
    assert not shelf.holds("x")


def test_shared_tensors_are_written_once_and_caches_not_at_all(tmp_path: Path) -> None:
    Shelf(tmp_path).put("x", _calls())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert len(file.keys()) == 7  # of eleven feeds, one is there twice, and three are nothing but a shape
        assert sum(file.get_tensor(key).numel() for key in file.keys()) == 6 + 20 + 10 + 2 + 1 + 1 + 20  # noqa: SIM118


def test_a_tensor_that_is_looked_at_like_zeros_is_no_stand_in() -> None:
    assert not is_stand_in(torch.ones(()).expand(3))
    assert not is_stand_in(torch.zeros(3))
    assert is_stand_in(torch.zeros(()).expand(3))


def test_damage_and_a_folder_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "s")
    shelf.put("x", _calls())
    path = tmp_path / "s" / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"x\.safetensors: is damaged .* delete it, and its calls are recorded again"):
        shelf.get("x")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot be made"):
        Shelf(tmp_path / "file")


def test_what_is_cut_off_while_it_is_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    shelf = Shelf(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            shelf.put("x", _calls())
    assert not shelf.holds("x")
    shelf.put("x", _calls())
    assert shelf.holds("x")
