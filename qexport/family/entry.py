"""What is known of a model before its weights are read: name, files, licence, and how much work is usual."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial", re.IGNORECASE)

UNPUBLISHED = "no published weights, train your own"
"""How the `source` of an entry begins whose shape is known, but no file of it."""


@dataclass(frozen=True)
class Effort:
    """How much is done unless one is told otherwise, so that it takes a minute or two on two cores.

    `verify` compares `samples` trajectories by `schedule`, one of the plan's, None for its default. `quantize`
    calibrates on `calibration_samples` trajectories by `calibration_schedule`.
    """

    samples: int = 64
    schedule: str | None = None
    calibration_samples: int = 64
    calibration_schedule: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """One model that can be loaded, for `qexport models` and for messages.

    `files` are the checkpoint files it is made of, in the order (generator, decoder); bundled ones lie inside the
    package. `parameters` counts the generator only.
    """

    name: str
    family: str
    image_size: int
    num_classes: int
    parameters: int
    files: tuple[str, ...]
    source: str
    licence: str
    bundled: bool
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def published(self) -> bool:
        """Whether a file of these weights is known to exist."""
        return not self.source.startswith(UNPUBLISHED)

    @property
    def licence_note(self) -> str | None:
        """A line to print where the weights are loaded; None if their licence does not restrict use."""
        return f"licence of {self.name}: {self.licence}" if NON_COMMERCIAL.search(self.licence) else None
