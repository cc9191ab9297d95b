"""Its place here puts `tests/` on the import path, for `recipe_weights` and the other helpers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qexport.bundle import Bundle

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test fetches nothing


@pytest.fixture(scope="session")
def w4_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """var-c10-d2 at 4 bits, made once for the whole run (capture takes ten seconds); not to be written to."""
    from qexport.pipeline import quantize
    from qexport.scheme import preset

    return quantize("var-c10-d2", scheme=preset(4), out=tmp_path_factory.mktemp("shared") / "var-c10-d2-w4a16")
