"""The result of `verify`: what was checked, measured and skipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qexport.verify.checks import Check, Skipped


@dataclass
class VerifyReport:
    """Everything that `verify` found; `to_json` is what goes into ``reports/verify.json``.

    `source` is where the weights are from, as the manifest says; `qexport.family.random_seed` tells random ones.
    `error_per_call` maps "graph/port group" to the relative L2 of each call; `layers` are the manifest's rows, with the
    `fused_form` that was measured; `pictures` maps a title to images (n, 3, H, W) in [0, 1] of the same seeds, for the
    HTML report only; so are `compared` (``compare.json``) and `sensitivity_svg`. `notes` are the lines of the
    manifest's. `latency_ms` and `bits_per_weight` are None where they could not be measured. `html` is
    where the HTML report was written, None where it was not; it is no part of the report.
    """

    bundle: str
    model: str = ""
    source: str = ""
    scheme: str = ""
    digest: str = ""
    checks: list[Check] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    trajectories: dict[str, Any] = field(default_factory=dict)
    error_per_call: dict[str, list[float]] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    totals: Mapping[str, Any] = field(default_factory=dict)
    placement: dict[str, Any] = field(default_factory=dict)
    latency_ms: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    compared: Any = None
    sensitivity_svg: bytes = b""
    html: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed. Skipped rungs do not fail; they are listed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, in the order of the ladder."""
        return [check for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, Any]:
        """Plain data; a number that JSON cannot hold is None."""
        data = {
            "passed": self.passed,
            "bundle": self.bundle,
            "model": self.model,
            "source": self.source,
            "scheme": self.scheme,
            "digest": self.digest,
            "checks": [check.to_json() for check in self.checks],
            "notes": list(self.notes),
            "skipped": [rung.to_json() for rung in self.skipped],
            "trajectories": self.trajectories,
            "error_per_call": self.error_per_call,
            "quality": self.quality,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "totals": dict(self.totals),
            "placement": self.placement,
            "latency_ms": self.latency_ms,
            "peak_memory_bytes": self.peak_memory_bytes,
            "environment": self.environment,
            "settings": self.settings,
            "layers": self.layers,
        }
        return _finite(data)


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
