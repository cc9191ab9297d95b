"""Tables of forms: what they estimate, where they are found, what they refuse, and the one that is measured here."""

from __future__ import annotations

import json

import onnx
import onnxruntime
import pytest

from qexport.bench.calibrate import ROUNDS, calibrate, timing
from qexport.bench.forms import forms_of, layer_model
from qexport.errors import InputError
from qexport.runtime.session import session_options
from qexport.targets import device_table, session_config
from qexport.targets.device_table import DeviceTable, Timing, find_table, read_table

TABLE = DeviceTable(
    "a device", "cpu", "by hand",
    (Timing("float32", 1, 100, 100, 10.0), Timing("float32", 100, 100, 100, 1000.0), Timing("float32", 1, 900, 900, 7)),
)  # fmt: skip

NOT_ON_H100 = {"int2-b32", "int2-b64", "int2-b128", "fp8-static-folded"}
"""Forms that were added when no GPU was at hand; the next table has them, and this goes."""

LOOSE = {"form": "x", "rows": 1, "inputs": 1, "outputs": 1, "us": 3.0, "least_us": 4.0, "greatest_us": 5.0}
"""A median that is less than the fastest round."""


def test_between_measured_rows_and_beyond():
    assert TABLE.time_us("float32", 10, 100, 100) == pytest.approx(100)  # a straight line in logarithms
    assert TABLE.time_us("float32", 200, 100, 100) == pytest.approx(2000)
    assert TABLE.time_us("float32", 1, 100, 200) == pytest.approx(20)  # in proportion to the weights
    assert TABLE.time_us("float32", 1, 1000, 1000) == pytest.approx(7 * 1000**2 / 900**2)  # of the nearest shape
    assert TABLE.time_us("int4-b32", 1, 100, 100) is None


def test_bounds_are_the_rounds_or_the_assumed_ones():
    rounds = DeviceTable("a", "cpu", "by hand", (timing("float32", 1, 10, 10, [8.0, 12.0, 9.0]),))
    assert [rounds.time_us("float32", 2, 10, 10, f) for f in ("low_us", "us", "high_us")] == [16, 18, 24]
    assumed = [TABLE.time_us("float32", 1, 100, 100, f) for f in ("low_us", "us", "high_us")]
    assert assumed == pytest.approx([9.75, 10, 10.25])


def test_rounds_are_kept_in_the_file_and_left_out_where_there_were_none(tmp_path):
    path = tmp_path / "t.json"
    for table in (TABLE, DeviceTable("a", "cpu", "by hand", (timing("float32", 1, 10, 10, [8.0, 12.0, 9.0]),))):
        path.write_text(table.dumps())
        assert read_table(path) == table
        assert ("least_us" in path.read_text()) == (table is not TABLE)


def test_the_default_of_cuda_is_a_calibration_of_every_form():
    table = read_table(device_table.TABLES / "h100.json")
    assert table.provider == "cuda"
    assert "H100" in table.device
    assert "--calibrate-device" in table.source
    assert table.forms == set(forms_of("cuda")) - NOT_ON_H100
    assert all(one.possible and one.least_us and one.greatest_us for one in table.timings)


def test_the_default_of_cuda_prefers_codes_for_a_row_and_floating_point_for_many():
    table = read_table(device_table.TABLES / "h100.json")
    for inputs, outputs in ((1024, 4096), (4096, 1024)):
        at_once = {
            rows: [table.time_us(form, rows, inputs, outputs) or 0 for form in ("int4-b32", "float16")]
            for rows in (1, 256)
        }
        assert at_once[1] == sorted(at_once[1])
        assert at_once[256] == sorted(at_once[256], reverse=True)


def test_where_a_table_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv(device_table.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match="--calibrate-device"):
        find_table("cpu", ["A Device (2)"])
    assert find_table("cuda", []) == read_table(device_table.TABLES / "h100.json")
    path = device_table.cached_path("A Device (2)", "cpu")
    assert path.name == "a-device-2-cpu.json"
    path.write_text(TABLE.dumps())
    assert find_table("cpu", ["A Device (2)"]) == TABLE
    with pytest.raises(InputError, match="a table of cpu"):
        find_table("cuda", [], path)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"timings": []}, {"timings": [{"form": "x"}]}, {"timings": [LOOSE]}, {"device": None}]
)
def test_what_is_no_table_is_refused(tmp_path, change):
    data = json.loads(TABLE.dumps()) | change
    if data["device"] is None:
        del data["device"]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="not a table"):
        read_table(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "nothing.json")


def test_calibration_measures_every_form():
    found = calibrate("cpu", threads=1, rows=(1, 8), shapes=((64, 128),), turns=1)
    assert found.failed == {}
    assert found.table.forms == set(forms_of("cpu"))
    assert {one.rows for one in found.table.timings} == {1, 8}
    assert all(one.possible and one.least_us and one.greatest_us for one in found.table.timings)
    assert f"median of {ROUNDS} rounds" in found.table.source


@pytest.mark.parametrize(
    ("name", "kernel", "dequantised"),
    [
        ("int2-b32", "MatMulNBits", 0),  # the same kernel as codes of 4 bits
        ("fp8-static", "QuantizeLinear", 1),  # the input; the weight is a constant by then
        ("fp8-static-folded", "QuantizeLinear", 1),
    ],
)
def test_forms_of_two_bits_and_of_fp8_are_what_they_say(tmp_path, name, kernel, dequantised):
    """The operators that ONNX Runtime made of them; a weight of fp8 is folded once, as the table's words say."""
    form = forms_of("cpu")[name]
    options = session_options(session_config("cpu", "serve", form.traits), 1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(layer_model(form, 64, 32, "float32"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert kernel in operators
    assert operators.count("DequantizeLinear") == dequantised
    if form.activation is not None:
        constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
        product = next(node for node in graph.node if node.op_type in ("MatMul", "FusedMatMul"))
        assert constants[product.input[1]] == onnx.TensorProto.FLOAT
