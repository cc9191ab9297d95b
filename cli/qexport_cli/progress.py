"""Progress on stderr, with the time left: bars, or, where stderr is no terminal, a line a minute of long work."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); a stage is named up to a colon, what follows may change."""

LINE_SECONDS = 60.0
"""Between lines; work that takes less says nothing."""


def speaks() -> bool:
    """Whether this process says what is and was done: of those that ``torchrun`` starts, the first."""
    return os.environ.get("RANK", "0") == "0"


class Lines:
    """Progress for log files: now and then a line of what is done of the present stage, and what it will still take."""

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """Take where lines go, without their ends, and a clock that counts seconds."""
        self._write, self._clock = write, clock
        self._last = clock()
        self._stage = ""
        self._began = (self._last, 0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report."""
        now, name = self._clock(), stage.partition(":")[0]
        if name != self._stage:
            self._stage, self._began = name, (now, done)
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        began, first = self._began
        left = (now - began) / (done - first) * (total - done) if first < done < total else None
        self._write(f"{stage}, {done} of {total}" + (f", {_duration(left)} left" if left is not None else ""))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


@contextlib.contextmanager
def work() -> Iterator[Report]:
    """Show progress while the block runs, and keep stdout clean: whatever libraries print goes to stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    error_console = Console(file=sys.stderr, markup=False, highlight=False)
    with contextlib.redirect_stdout(sys.stderr):
        if not speaks():
            yield lambda stage, done, total: None
            return
        if not error_console.is_terminal:
            yield Lines(lambda line: print(line, file=sys.stderr, flush=True))
            return
        with Progress(*columns, console=error_console, transient=True) as progress:
            tasks: dict[str, TaskID] = {}

            def report(stage: str, done: int, total: int) -> None:
                name = stage.partition(":")[0]
                if name not in tasks:
                    for task in progress.tasks:  # a new stage means that the ones before are through
                        progress.update(task.id, completed=task.total)
                    tasks[name] = progress.add_task(stage, total=total)
                progress.update(tasks[name], description=stage, completed=done, total=total)

            yield report
