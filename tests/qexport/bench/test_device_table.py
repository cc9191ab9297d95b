"""Tables of forms: what they estimate, where they are found, what they refuse, and the one that is measured here."""

from __future__ import annotations

import json

import pytest

from qexport.bench.calibrate import ROUNDS, calibrate, timing
from qexport.bench.forms import forms_of
from qexport.errors import InputError
from qexport.targets import device_table
from qexport.targets.device_table import DeviceTable, Timing, find_table, read_table

TABLE = DeviceTable(
    "a device", "cpu", "by hand",
    (Timing("float32", 1, 100, 100, 10.0), Timing("float32", 100, 100, 100, 1000.0), Timing("float32", 1, 900, 900, 7)),
)  # fmt: skip

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


def test_the_assumed_spread_covers_what_the_table_shows_of_itself():
    table = read_table(device_table.TABLES / "h100.json")
    launches = [t.us for t in table.timings if t.form == "float16" and t.rows <= 128]
    assert max(launches) / min(launches) < (1 + device_table.ASSUMED_SPREAD) / (1 - device_table.ASSUMED_SPREAD)


def test_rounds_are_kept_in_the_file_and_left_out_where_there_were_none(tmp_path):
    path = tmp_path / "t.json"
    for table in (TABLE, DeviceTable("a", "cpu", "by hand", (timing("float32", 1, 10, 10, [8.0, 12.0, 9.0]),))):
        path.write_text(table.dumps())
        assert read_table(path) == table
        assert ("least_us" in path.read_text()) == (table is not TABLE)


def test_the_default_of_cuda_has_what_was_measured_and_nothing_else():
    table = read_table(device_table.TABLES / "h100.json")
    assert table.provider == "cuda"
    assert table.forms == {
        "float16", "int4-b32", "int4-b128", "int8-channel", "int8-static", "int8-static-folded", "fp8-static"
    }  # fmt: skip
    # An eighth of the microseconds of eight products: fp16 and int4 in blocks of 32, at 2 and at 4096 rows.
    times = {name: table.time_us(name, rows, 1920, 7680) for rows in (4096,) for name in ("float16", "int4-b32")}
    assert times == {"float16": 1410 / 8, "int4-b32": 1516 / 8}
    assert table.time_us("int4-b32", 2, 1920, 7680) == 136 / 8


def test_where_a_table_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv(device_table.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match="--calibrate-device"):
        find_table("cpu", ["A Device (2)"])
    assert find_table("cuda", []).device == "NVIDIA H100 80GB"
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
    assert all(0 < one.least_us <= one.us <= one.greatest_us for one in found.table.timings)
    assert f"median of {ROUNDS} rounds" in found.table.source
