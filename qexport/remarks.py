"""What quantisation came upon and went on from: nothing is wrong, but whoever reads the result should know.

Every such case is a `Remark`; those of one kind become one line, with how many places there are and the first of them.
They are printed once the bundle is written, and kept in its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Remark:
    """One place: `count` of its `of` parts are concerned (channels, groups, steps …); `of` is 0 where it has none."""

    kind: str
    place: str
    count: int = 0
    of: int = 0


@dataclass(frozen=True)
class _Kind:
    """`places` concerned, with `what`, and the `outcome`. `places` ends in an s in the plural only."""

    places: str
    what: str
    outcome: str


_KINDS: dict[str, _Kind] = {
    "zero_weights": _Kind("layer", "with groups of weights that are all zero", "scale 1, they stay zero"),
    "gptq_zero_channels": _Kind(
        "layer",
        "with input channels that are always zero in calibration",
        "GPTQ leaves their weights to rounding to nearest",
    ),
    "smooth_zero_channels": _Kind(
        "smoothed input", "with channels that are always zero in calibration", "smoothing leaves them as they are"
    ),
    "smooth_zero_weights": _Kind(
        "smoothed input", "with channels whose weights are all zero", "nothing depends on how those are smoothed"
    ),
    "constant_channels": _Kind(
        "layer", "with input channels that never change in calibration", "they count with that one value"
    ),
    "zero_inputs": _Kind(
        "layer",
        "with inputs that are always zero in calibration",
        "scale 1; should anything else come, it is rounded to whole numbers",
    ),
    "constant_inputs": _Kind(
        "layer",
        "with inputs that never change in calibration",
        "the scale is made for that one value; anything greater may be clipped",
    ),
    "not_smoothed": _Kind(
        "layer", "without anything before that could take up a factor", "quantised without smoothing, as they are"
    ),
    "calls_left_out": _Kind(
        "graph", "with more calls than calibration keeps", "an even share of them is calibrated on"
    ),
}
"""Every kind, in the order in which they are told."""


def summary(remarks: Iterable[Remark]) -> list[dict[str, Any]]:
    """Plain data for the manifest: of each kind `kind`, `text` (the line) and `places`: name → [count, of]."""
    found: dict[str, dict[str, list[int]]] = {}
    for remark in remarks:
        found.setdefault(remark.kind, {})[remark.place] = [remark.count, remark.of]
    return [
        {"kind": kind, "text": _line(_KINDS[kind], found[kind]), "places": found[kind]}
        for kind in _KINDS
        if kind in found
    ]


def _line(kind: _Kind, places: dict[str, list[int]]) -> str:
    """``3 layers with … (blocks.0.fc1: 12 of 256): what follows from it``."""
    first, (count, of) = next(iter(places.items()))
    plural = "s" if len(places) != 1 else ""
    where = f"{first}: {count} of {of}" if of else first
    more = ", …" if len(places) > 1 else ""
    return f"{len(places)} {kind.places}{plural} {kind.what} ({where}{more}): {kind.outcome}"
