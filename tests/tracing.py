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
    traced: dict[tuple[object, ...], tuple[Part, ir.Model]] = {}
    trace = capture._trace

    def once(part: Part, sizes: Mapping[str, int]) -> ir.Model:
        key = id(part.modules[0]), part.inputs, part.outputs  # a graph without parts makes itself one every time
        if key not in traced:
            traced[key] = part, trace(part, sizes)  # the part is kept, so that no other module gets its identity
        return traced[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "_trace", once)
        yield
