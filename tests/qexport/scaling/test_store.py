"""The store on its own: what is written comes back, claims, files that are no stores."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from qexport.errors import InputError
from qexport.scaling import store as module
from qexport.scaling.grid import Run
from qexport.scaling.store import Measured, Store, is_alive, own_name

RUN = Run("var-c10-d2", "int4", "gptq")
MEASURED = Measured(
    {"kl": {"value": 0.1, "ci95": [0.05, 0.2], "n": 2}},
    {"total_bits": 8},
    {"kl": np.array([0.05, 0.15])},
    {"measurement": {"seed": 0}},
)


def record(store, key, measured=MEASURED):
    store.record(key, RUN, measured, environment={"cpu": "x"}, version="1", wall_s=2.5)


def test_a_row_comes_back_as_it_was(tmp_path):
    with Store(tmp_path / "deep" / "s.sqlite") as store:
        record(store, "a")
    with Store(tmp_path / "deep" / "s.sqlite", create=False) as store:
        (row,) = store.rows()
        assert store.keys() == {"a"}
    assert (row.key, row.run, row.version, row.wall_s) == ("a", RUN, "1", 2.5)
    assert row.measured.figures == MEASURED.figures
    assert row.measured.cost == {"total_bits": 8}
    assert row.settings == {"measurement": {"seed": 0}}
    np.testing.assert_array_equal(row.measured.per_image["kl"], [0.05, 0.15])
    assert row.finished_at.endswith("+00:00")


def test_the_first_result_of_a_key_stays(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        record(store, "a")
        record(store, "a", Measured({}, {"total_bits": 9}, {"other": np.zeros(2)}))
        (row,) = store.rows()
    assert row.measured.cost == {"total_bits": 8}
    assert set(row.measured.per_image) == {"kl"}


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.claim("a")
        with pytest.raises(ValueError, match="could not convert"):
            record(store, "a", Measured({}, {}, {"kl": np.array(["no number"])}))
        assert store.rows() == []
        assert store.claims() == {"a": own_name()}


def test_a_key_has_one_holder(tmp_path, monkeypatch):
    path = tmp_path / "s.sqlite"
    with Store(path) as mine, Store(path) as other:
        assert mine.claim("a")
        assert mine.claim("a")  # my own, again
        with monkeypatch.context() as patch:
            parent = f"{module._host()}|{os.getppid()}|{module._started(os.getppid())}"
            patch.setattr(module, "own_name", lambda: parent)
            assert not other.claim("a")  # a living process holds it
            other.release("a")  # not its own: stays
            assert not other.claim("a")
        mine.release("a")
        assert mine.claims() == {}
        record(mine, "a")
        assert not other.claim("a")  # done


def test_claims_of_processes_that_are_gone_are_taken_over(tmp_path):
    path = tmp_path / "s.sqlite"
    code = f"from qexport.scaling.store import Store; print(Store({str(path)!r}).claim('a'))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
    with Store(path) as store:
        assert store.claims() == {}
        assert store.claim("a")
        assert store.claims() == {"a": own_name()}


def test_a_number_that_was_given_to_another_process_is_not_the_holder():
    host, number, started = own_name().split("|")
    assert is_alive(own_name(), 0)
    assert not is_alive(f"{host}|{number}|{int(started) + 1}", 0)
    assert not is_alive(f"{host}|{2**22 + 1}|{started}", 0)  # beyond the greatest number there is


def test_other_hosts_are_believed_for_a_day():
    import time

    owner = "elsewhere/boot|1|1"
    assert is_alive(owner, time.time() - 60)
    assert not is_alive(owner, time.time() - module.FOREIGN_STALE_S - 60)


def test_files_that_are_no_stores(tmp_path):
    (tmp_path / "text").write_text("no database, but long enough to be looked at " * 30)
    with pytest.raises(InputError, match="not a store"):
        Store(tmp_path / "text")
    foreign = sqlite3.connect(tmp_path / "foreign")
    foreign.execute("CREATE TABLE t (x)")
    foreign.commit()
    foreign.close()
    before = (tmp_path / "foreign").read_bytes()
    with pytest.raises(InputError, match="another program"):
        Store(tmp_path / "foreign")
    assert (tmp_path / "foreign").read_bytes() == before
    with pytest.raises(InputError, match="no such store"):
        Store(tmp_path / "missing", create=False)
    assert not (tmp_path / "missing").exists()
    with Store(tmp_path / "newer") as store:
        store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="version 99"):
        Store(tmp_path / "newer")
