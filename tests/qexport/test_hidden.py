"""Hidden names, and the places that they stand for."""

from pathlib import Path

import pytest

from qexport.hidden import meant_by, partial_of


@pytest.mark.parametrize("attempt", [0, 7])
@pytest.mark.parametrize("path", ["/a/b.onnx", "b", "x.partial", "a/var-c10-d2-w4a16"])
def test_a_hidden_name_stands_for_its_place(path, attempt):
    hidden = partial_of(Path(path), attempt)
    assert hidden.parent == Path(path).parent
    assert hidden.name.startswith(".")
    assert meant_by(str(hidden)) == path
    assert meant_by(f"{hidden}/weights.data") == f"{path}/weights.data"


@pytest.mark.parametrize("path", ["/a/.b", "/a/b.partial-1", "/a/.b.partial-x", "/a/.b.partial-1.c", ".venv/c"])
def test_other_names_are_left_alone(path):
    assert meant_by(path) == path
