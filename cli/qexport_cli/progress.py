"""Progress bars on stderr, with the time left; nothing at all where stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); a stage is named up to a colon, what follows may change."""


@contextlib.contextmanager
def work() -> Iterator[Report]:
    """Show progress while the block runs, and keep stdout clean: whatever libraries print goes to stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    error_console = Console(file=sys.stderr, markup=False, highlight=False)
    with contextlib.redirect_stdout(sys.stderr):
        if not error_console.is_terminal:
            yield lambda stage, done, total: None
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
