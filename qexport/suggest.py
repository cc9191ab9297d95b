"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """``", did you mean 'a' or 'b'?"`` with the nearest of `known`, or an empty string if none is near."""
    matches = get_close_matches(name.lower(), list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""
