"""What a target's graphs say of themselves."""

from __future__ import annotations

import onnx

from qexport.bundle import Bundle
from qexport.targets.keys import DTYPE_KEY


def compute_dtype(bundle: Bundle, target: str | None) -> str:
    """The type that the graphs compute in: of the portable ones, or the narrowest of a target's.

    Raises:
        InputError: the bundle was not lowered to that target.
    """
    if target is None:
        return bundle.manifest.dtype
    found = set()
    for file in bundle.graph_files(target).values():
        model = onnx.load(str(file), load_external_data=False)
        found |= {entry.value for entry in model.metadata_props if entry.key == DTYPE_KEY}
    return "float16" if "float16" in found else bundle.manifest.dtype
