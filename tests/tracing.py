"""Tracing a part takes seconds and gives the same every time: once is enough for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import pytest

from qexport.family import Part
from qexport.graph import capture


@contextmanager
def traced_once() -> Iterator[None]:
    """While entered, each part is traced once; parts must not be changed meanwhile."""
    traced: dict[int, tuple[Part, ir.Model]] = {}
    trace = capture._trace

    def once(part: Part, sizes: Mapping[str, int]) -> ir.Model:
        if id(part) not in traced:
            traced[id(part)] = part, trace(part, sizes)  # the part is kept, so that no other gets its identity
        return traced[id(part)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_trace", once)
        yield
