"""Freed memory goes back to the system, and a session that was made gives back what it needed for that."""

from __future__ import annotations

import ctypes
import sys

import pytest
import toy_bundle

from qexport.bench.memory import resident_by_kind
from qexport.runtime import heap, session
from qexport.runtime.heap import give_back_freed
from qexport.targets import QuantTraits, session_config

BLOCK = 64 * 1024
"""Bytes; below glibc's least threshold for mappings of their own, 128 KiB, so that it comes from the heap."""
BLOCKS = 1024
SHARE = 0.9
"""Of what was freed: must stay before and go after. The rest is for what else the process does meanwhile."""


def own_bytes() -> int:
    held = resident_by_kind()
    assert held is not None
    return held.anonymous


GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_freed_blocks_stay_until_they_are_given_back():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    give_back_freed()  # what earlier tests left
    blocks = [library.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    last = blocks.pop()  # at the top of the heap: else glibc would shorten the heap by itself
    full = own_bytes()
    for block in blocks:
        library.free(block)
    assert full - own_bytes() < (1 - SHARE) * BLOCK * BLOCKS
    assert give_back_freed()
    assert full - own_bytes() > SHARE * BLOCK * BLOCKS
    library.free(last)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(heap.ctypes, "CDLL", None)  # must not be called
    assert give_back_freed() is False


def test_a_new_session_gives_back(tmp_path, monkeypatch):
    toy_bundle.write(tmp_path / "toy")
    told = []
    monkeypatch.setattr(session, "give_back_freed", lambda: told.append(True))
    file = next((tmp_path / "toy").glob("*.onnx"))
    session.make_session(file, file.parent, session_config("cpu", "exact", QuantTraits()), 1)
    assert told == [True]
