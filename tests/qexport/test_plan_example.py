"""The player printed in docs/bundle.md is run as it stands there, and draws what ours draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from qexport.runtime import load

PAGE = Path(__file__).parents[2] / "docs" / "bundle.md"


def printed_player():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    namespace: dict = {"__name__": "printed"}
    exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace["play"]


def test_the_printed_player_draws_our_images(w4_bundle):
    got = printed_player()(str(w4_bundle.path), {"label": [1, 8, 3]}, seed=7)
    want = load(w4_bundle.path, provider="cpu", options="serve").generate([1, 8, 3], seed=7, batch=3)
    np.testing.assert_allclose(got, want, atol=1e-5)
