"""Hidden names, and the places that they stand for."""

from pathlib import Path

import pytest

from qexport.hidden import meant_by, partial_of, replacing


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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()

    def interrupted():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with pytest.raises(OSError, match="disk"), replacing(path):
        raise OSError("disk")  # before anything was written
    assert [found.name for found in tmp_path.iterdir()] == ["report.json"]
