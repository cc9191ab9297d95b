"""Hidden names: what is written whole or not at all lies under one, beside its place, until it is complete.

Nobody but qexport has heard of such a name, so a message about one speaks of the place that it stands for.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = re.compile(r"(^|[/\\])\.([^/\\]+)\.partial-\d+(?:-\d+)?(?=[/\\]|$)")


def partial_of(path: Path, attempt: int = 0) -> Path:
    """The hidden name of this process for `path`, on the same file system; another one for every `attempt`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}" + (f"-{attempt}" if attempt else ""))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file's hidden name to write to: renamed to `path` after the block, removed if an error leaves it."""
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def meant_by(name: str) -> str:
    """`name`, a path in text, with the hidden names in it replaced by what they stand for."""
    return _PARTIAL.sub(r"\1\2", name)
