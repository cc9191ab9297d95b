"""Whether sums of products are exact is read from what Linux says, and not assumed."""

from __future__ import annotations

import pytest

from qexport.targets import QuantTraits, processor, session_config

PRECISE = "session.x64quantprecision"
INTEGERS = QuantTraits(
    with_activations=frozenset({"int8"}), activations=frozenset({"int8"}), convolution=True, integer_convolution=True
)


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """A file that stands for the system's; what was read before and will be after is forgotten."""
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.sums_exactly.cache_clear()
    yield tmp_path / "cpuinfo"
    processor.sums_exactly.cache_clear()


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features : fp asimd\n", False),
        (None, False),
    ],
    ids=["avx512", "avx", "without", "arm", "no such file"],
)
@pytest.mark.parametrize("options", ["serve", "exact"])
def test_weights_become_uint8_where_sums_might_saturate(cpuinfo, text, exact, options):
    if text is not None:
        cpuinfo.write_text(text)
    assert processor.sums_exactly() is exact
    entries = session_config("cpu", options, INTEGERS).entries
    assert (PRECISE not in entries) is exact
    assert PRECISE not in session_config("cpu", options, QuantTraits(convolution=True)).entries


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert processor.usable_cores() == 2
    monkeypatch.delattr(processor.os, "sched_getaffinity")
    assert processor.usable_cores() == processor.os.cpu_count()
