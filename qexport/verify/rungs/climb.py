"""What the rungs share: the bundle, the report, the settings, and sessions that are made once for each option set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from qexport.bundle import Bundle
from qexport.errors import BundleError
from qexport.family import Effort
from qexport.runtime import Runtime, load
from qexport.verify.checks import NOWHERE, Place, Progress, Skipped, failed
from qexport.verify.report import VerifyReport

PICTURES = 10
"""Images of each side in the HTML report."""

_T = TypeVar("_T")


@dataclass
class Climb:
    """One bundle on the ladder.

    `batch` is the most images at a time, `seed` that of everything drawn, `target` the graphs that are verified (None:
    the portable ones). `effort` is set by `choose_effort`.
    """

    bundle: Bundle
    provider: str
    report: VerifyReport
    tell: Progress
    batch: int
    seed: int
    target: str | None = None
    effort: Effort = field(default_factory=Effort)
    _runtimes: dict[str, Runtime | None] = field(default_factory=dict)

    def runtime(self, options: str) -> Runtime | None:
        """The bundle's sessions under an option set, made once; None if it cannot be loaded (a failed check)."""
        if options not in self._runtimes:
            self._runtimes[options] = self.attempt(
                f"graphs load ({options})",
                lambda: load(
                    self.bundle.path, provider=self.provider, options=options, target=self.target, check="size"
                ),
            )
        return self._runtimes[options]

    def attempt(self, name: str, action: Callable[[], _T]) -> _T | None:
        """The result of `action`, or None and a failed check if the bundle is not what it should be."""
        try:
            return action()
        except BundleError as error:
            text = str(error)
            named = [g for g in self.bundle.plan.graphs if f"{g!r}" in text or self.bundle.manifest.graphs[g] in text]
            self.report.checks.append(failed(name, Place(named[0]) if named else NOWHERE, text))
            return None

    def skip(self, name: str, reason: str) -> None:
        """List a rung that is not climbed."""
        self.report.skipped.append(Skipped(name, reason))
