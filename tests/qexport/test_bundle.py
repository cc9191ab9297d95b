import hashlib
import json
import os

import numpy as np
import pytest
import toy_bundle

from qexport.bundle import Bundle, Manifest, WeightFileWriter
from qexport.bundle.manifest import canonical
from qexport.errors import BundleError, InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "toy"
    toy_bundle.write(folder)
    return folder


def test_round_trip(folder):
    bundle = Bundle.open(folder)
    assert bundle.plan.graphs == ("step", "drift", "decode")
    assert bundle.manifest.model.name == "toy"
    assert bundle.graph_files()["decode"] == folder / "decode.onnx"
    assert bundle.size_bytes == sum(f.stat().st_size for f in folder.iterdir() if f.name != "manifest.json")
    np.testing.assert_array_equal(bundle.table("tab"), toy_bundle.TAB)
    np.testing.assert_array_equal(bundle.tables()["drifts"], toy_bundle.DRIFTS)
    assert not bundle.table("tab").flags.writeable


def test_manifest_can_be_checked_without_qexport(folder):
    data = json.loads((folder / "manifest.json").read_bytes())
    assert list(data)[-1] == "digest"
    digest = data.pop("digest")
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(text.encode("utf-8")).hexdigest() == digest == Bundle.open(folder).manifest.digest
    assert set(data["files"]) == {f.name for f in folder.iterdir()} - {"manifest.json"}
    for name, entry in data["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def test_same_input_same_bytes(folder, tmp_path):
    toy_bundle.write(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_order_of_keys_does_not_reach_the_file(folder):
    manifest = Bundle.open(folder).manifest
    turned = Manifest(**{**vars(manifest), "files": dict(reversed(manifest.files.items()))})
    assert turned.dumps() == manifest.dumps()
    assert Manifest.loads(manifest.dumps()) == manifest


def test_canonical_json():
    data = {"b": (np.float32(0.5), np.int64(2)), "a": "é"}
    assert canonical(data) == b'{"a":"\\u00e9","b":[0.5,2]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical(float("nan"))
    with pytest.raises(TypeError, match="set"):
        canonical({1})


def test_newest(tmp_path):
    with pytest.raises(InputError, match="no bundle under"):
        Bundle.newest(tmp_path / "qexport-out")
    for age, name in enumerate(["new", "old", ".hidden.partial-1"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
        when = 1_000_000 - age if name != ".hidden.partial-1" else 2_000_000
        os.utime(tmp_path / name / "manifest.json", (when, when))
    assert Bundle.newest(tmp_path) == tmp_path / "new"


def test_target_graphs(tmp_path, folder):
    toy_bundle.write(tmp_path / "toy", target=True)
    files = Bundle.open(tmp_path / "toy").graph_files("toy")
    assert files["decode"] == tmp_path / "toy/targets/toy/decode.onnx"
    assert files["step"] == tmp_path / "toy/step.onnx"
    with pytest.raises(InputError, match=r"not lowered to 'toy' \(lowered to: none\)"):
        Bundle.open(folder).graph_files("toy")


def test_weights_alignment_and_content(tmp_path):
    big = np.arange(20_000, dtype=np.float32)
    with WeightFileWriter(tmp_path / "w") as writer:
        refs = [
            writer.add("a", b"\x21\x03", "int4", (3,)),
            writer.add("b", np.array([1.5, 2.5], ">f4"), "float32", (2,)),
            writer.add("big", big, "float32", (100, 200)),
            writer.add("none", np.zeros((0, 4), np.float32), "float32", (0, 4)),
            writer.add("scalar", np.array(7, np.int64), "int64", ()),
            writer.add("turned", np.arange(6, dtype=np.int32).reshape(2, 3).T, "int32", (3, 2)),
        ]
        assert list(writer.refs.values()) == refs
    assert writer.sha256 == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    assert [ref.offset for ref in refs] == [0, 64, 4096, 84_096 + 0, 84_096, 84_160]
    assert [ref.nbytes for ref in refs] == [2, 8, 80_000, 0, 8, 24]
    content = (tmp_path / "w").read_bytes()
    assert content[:2] == b"\x21\x03"
    assert content[2:64] == bytes(62)
    assert content[64:72] == b"\x00\x00\xc0\x3f\x00\x00\x20\x40"
    assert content[4096:84_096] == big.tobytes()
    assert np.frombuffer(content[84_160:], "<i4").tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("name", "data", "dtype", "shape", "message"),
    [
        ("a", b"\0", "int8", (1,), "stored once"),
        ("b", b"\0", "int8", (2,), "needs 2 bytes, got 1"),
        ("b", b"\0\0", "int4", (2,), "needs 1 bytes, got 2"),
        ("b", b"\0", "int5", (1,), "unknown dtype"),
        ("b", np.zeros(1, np.int32), "float32", (1,), "the array is int32, not float32"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, name, data, dtype, shape, message):
    with WeightFileWriter(tmp_path / "w") as writer:
        writer.add("a", b"\0", "uint8", (1,))
        with pytest.raises(ValueError, match=message):
            writer.add(name, data, dtype, shape)
        assert set(writer.refs) == {"a"}


def test_weights_beyond_four_gigabytes(tmp_path):
    far = 5 * 2**30
    with WeightFileWriter(tmp_path / "w") as writer:
        writer._file.seek(far)  # a hole: takes no space on disk
        writer._end = far
        ref = writer.add("x", np.array([1.25], np.float32), "float32", (1,))
    assert ref.offset == far
    assert np.memmap(tmp_path / "w", np.float32, "r", ref.offset, (1,))[0] == 1.25


def test_only_some_dtypes_can_be_tables(tmp_path):
    with WeightFileWriter(tmp_path / "w") as writer:
        ref = writer.add("a", b"\0", "int4", (2,))
    with pytest.raises(ValueError, match="cannot be int4"):
        ref.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b"[]", "not the manifest"),
        (b"{}", "not the manifest"),
        (b'{"format": "qexport-bundle", "format_version": 9}', "format version 9, this qexport reads 1"),
        (b'{"format": "qexport-bundle", "format_version": 1, "x": 1e999, "digest": "0"}', "edited or damaged"),
    ],
)
def test_manifests_that_are_none(text, message):
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.loads(text)
    assert "\n" not in str(caught.value)
