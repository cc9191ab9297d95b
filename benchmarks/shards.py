"""A list of measurements shared by processes with a file each: who takes which, and how the files become one."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = dict[str, Any]


def shard_of(items: Sequence[T], shard: str | None) -> Sequence[T]:
    """``I/N``: every N-th item from the I-th, counted from 0; None: all.

    Raises:
        SystemExit: not of that form.
    """
    if shard is None:
        return items
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise SystemExit(f"--shard {shard}: write I/N with 0 <= I < N")
    return items[int(index) :: int(count)]


def merged(rows: Iterable[Row], more: Iterable[Row], key_of: Callable[[Row], Hashable]) -> list[Row]:
    """All rows, of those with the same key the first."""
    found: dict[Hashable, Row] = {}
    for row in (*rows, *more):
        found.setdefault(key_of(row), row)
    return list(found.values())


def read(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; none where it is not there, and no last one that was cut off."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def save(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows, or leave what is there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def append(path: Path, row: Row) -> None:
    """Add a row at once; what a killed process left of a last one is dropped."""
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(row).encode() + b"\n")
