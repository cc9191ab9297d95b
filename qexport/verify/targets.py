"""What a target's graphs say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from qexport.bundle import Bundle
from qexport.targets.keys import DTYPE_KEY


def compute_dtype(bundle: Bundle, target: str | None) -> str:
    """The type that the graphs compute in, the decoder at the end left out: of the portable ones, or a target's.

    Of a target it is the narrowest of all its graphs.

    Raises:
        InputError: the bundle was not lowered to that target.
    """
    if target is None:
        return bundle.manifest.dtype
    last = bundle.plan.calls[-1].graph
    first = [name for name in bundle.graph_files(target) if name != last] or [last]
    return "float16" if "float16" in _dtypes(bundle, target, first) else bundle.manifest.dtype


def has_half_decoder(bundle: Bundle, target: str | None) -> bool:
    """Whether the last graph of a plan of several computes in float16."""
    last = bundle.plan.calls[-1].graph
    return target is not None and len(bundle.plan.graphs) > 1 and "float16" in _dtypes(bundle, target, [last])


def _dtypes(bundle: Bundle, target: str, graphs: Sequence[str]) -> set[str]:
    files = bundle.graph_files(target)
    models = [onnx.load(str(files[name]), load_external_data=False) for name in graphs]
    return {entry.value for model in models for entry in model.metadata_props if entry.key == DTYPE_KEY}
