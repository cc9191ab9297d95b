"""Bundles as skeletons (benchmarks/skeleton.py), and the process that a benchmark gives to each of its parts."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qexport.bundle import Bundle
from qexport.errors import BundleError
from qexport.lower import lower
from qexport.runtime import load

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

skeleton = import_module("skeleton")
parts = import_module("parts")

EXACT_BYTES = 4096
"""Of a model this small, most tensors are below the 64 KiB that are kept otherwise."""


@pytest.fixture
def unpacked(w4_bundle, copied, tmp_path) -> tuple[Bundle, Bundle]:
    """var-c10-d2 at 4 bits, lowered, and what its skeleton became."""
    path = copied(w4_bundle)
    lower(path, "ort-cuda", dtype="float32")
    archive = tmp_path / "packed" / "one.tar.xz"
    size_bytes = skeleton.pack([path], archive, EXACT_BYTES)
    assert size_bytes == archive.stat().st_size < Bundle.open(path, "size").size_bytes
    (folder,) = skeleton.unpack(archive, tmp_path / "there")
    return Bundle.open(path, "size"), Bundle.open(folder, "size")


def tensors(bundle: Bundle) -> dict[tuple[str, str], tuple[int, bytes]]:
    """Element type and bytes of every external tensor of the lowered graphs."""
    found = {}
    for name, file in bundle.graph_files("ort-cuda").items():
        for tensor in onnx.load(str(file), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                data = (bundle.path / place["location"]).read_bytes()
                start = int(place["offset"])
                found[name, tensor.name] = tensor.data_type, data[start : start + int(place["length"])]
    return found


def test_small_tensors_are_exact_and_large_ones_are_not(unpacked):
    before, after = (tensors(bundle) for bundle in unpacked)
    assert before.keys() == after.keys()
    integers = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
    kept = [key for key, (kind, data) in before.items() if len(data) < EXACT_BYTES or kind in integers]
    filled = before.keys() - kept
    assert kept
    assert {before[key][0] for key in filled} >= {TensorProto.INT4, TensorProto.FLOAT16}
    assert all(before[key] == after[key] for key in kept)
    assert all(len(before[key][1]) == len(after[key][1]) and before[key] != after[key] for key in filled)


def test_the_plan_is_whole_and_images_are_finite(unpacked):
    before, after = unpacked
    assert before.plan == after.plan
    tables = after.tables()
    assert all(np.array_equal(table, tables[name]) for name, table in before.tables().items())
    assert json.loads((after.path / skeleton.FACTS).read_text())["size_bytes"] == before.size_bytes
    images = load(after.path, provider="cpu", target="ort-cuda", threads=1, check="size").generate([1, 2])
    assert np.isfinite(images).all()
    assert images.std() > 0


def test_a_full_check_tells_that_it_is_none(unpacked):
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(unpacked[1].path)


def test_scales_and_zero_points_are_told_from_weights():
    nodes = [
        helper.make_node("Cast", ["s"], ["s32"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["q", "s32", "z"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    assert skeleton._roles(helper.make_graph(nodes, "g", [], [])) == {"s": "scale", "z": "zero_point"}


@pytest.mark.parametrize("dtype", skeleton.FILLED)
def test_what_fills_is_finite_and_of_its_kind(dtype, monkeypatch):
    monkeypatch.setattr(skeleton, "BLOCK_BYTES", 65536)
    block = skeleton.filling.__wrapped__(dtype, "weight")
    assert len(block) == 65536
    kind = TensorProto.DataType.Value(dtype)
    count = 65536 * 2 if "INT4" in dtype else 65536 // np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize
    tensor = TensorProto(data_type=kind, dims=[count], raw_data=bytes(block))
    values = numpy_helper.to_array(tensor).astype(np.float32)
    assert np.isfinite(values).all()
    middle = {"UINT8": 128 + 8, "UINT4": 8}.get(dtype, 0)
    assert abs(values.mean() - middle) < 2
    assert values.std() > 0.01
    if dtype in ("FLOAT", "FLOAT16"):
        scales = np.frombuffer(skeleton.filling.__wrapped__(dtype, "scale"), f"<f{65536 // count}")
        assert (scales > 0).all()


def tells_then_sleeps(tell, seconds: float) -> None:
    tell(1, {"ms": 1.0})
    time.sleep(seconds)


def fails(tell) -> None:
    raise ValueError("first line\nsecond")


def test_a_part_is_heard_at_once_and_killed_in_time():
    heard: list[int] = []
    hear = lambda batch, found: heard.append(batch)  # noqa: E731
    start = time.monotonic()
    assert parts.in_a_process(tells_then_sleeps, (600,), 20, hear) == "timed out after 20 s"
    assert heard == [1]
    assert time.monotonic() - start < 60
    assert parts.in_a_process(tells_then_sleeps, (0,), 60, hear) is None
    assert parts.in_a_process(fails, (), 60, hear) == "ValueError: first line second"
