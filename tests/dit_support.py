"""What the tests of the diffusion family share."""

from __future__ import annotations

from typing import Any

from support import checkpoint, on_meta, relative_l2, spec, state_of, tensors
from support import published_lists as _published_lists

__all__ = [
    "BROKEN",
    "RELATIVE_L2",
    "checkpoint",
    "on_meta",
    "published_lists",
    "relative_l2",
    "spec",
    "state_of",
    "tensors",
]

RELATIVE_L2 = 2e-5
"""float32 against float32, other kernels: one unit in the last place of a timestep frequency moves a timestep
embedding at t = 999 by 9e-6; everything else that was measured stays below 2e-6."""

BROKEN = 5 * RELATIVE_L2
"""A mutation must at least be this far off, or the test above it guards nothing."""


def published_lists() -> dict[str, dict[str, Any]]:
    """Model → config, parameters (a count), shapes (key → shape); all float32."""
    return _published_lists("dit")
