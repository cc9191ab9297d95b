"""How things look: tables, figures with their units, JSON. Rendering only; what is shown is decided elsewhere."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qexport.family import random_seed

PIPE_WIDTH = 120
"""Columns where stdout is no terminal and `COLUMNS` says nothing."""

WIDE = 110
"""From this width on, tables show their `wide_only` columns."""

GAP = 3
"""Columns between the cells of a table."""

MIN_SHORTENED = 8

MANY = 1e7
"""Figures below this are written out, not as a power of ten."""


class _Console(Console):
    """rich ends the process on a closed pipe; here `failures` decides."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Numbers go `right`; `wide_only` ones are left out where they do not fit. Where a table is still too wide, a `fold`
    column wraps, and a `shorten` column loses the middle of its texts; all others keep their width.
    """

    title: str
    right: bool = False
    wide_only: bool = False
    fold: bool = False
    shorten: bool = False


def console() -> Console:
    """stdout. No markup is interpreted and nothing is highlighted, since names and paths come from outside."""
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPE_WIDTH
    return _Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print rows under headings; None is shown as a dash, True and False as ✓ and ✗. Empty columns are left out.

    Columns that are left out for want of room are named below the table.
    """
    out = console()
    rows = list(rows)
    filled = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    shown = [i for i in filled if out.width >= WIDE or not columns[i].wide_only]
    cells = [[_cell(row[i]) for i in shown] for row in rows]
    _shorten([columns[i] for i in shown], cells, out.width)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold")
    for i in shown:
        column = columns[i]
        justify = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=not column.fold, overflow="fold")
    for row in cells:
        table.add_row(*row)
    if title:
        out.print(Text(title, style="bold"))
    out.print(table)
    if hidden := [columns[i].title for i in filled if i not in shown]:
        out.print(Text(f"not shown: {', '.join(hidden)} (from {WIDE} columns on, or with --json)", style="dim"))


def print_facts(facts: Mapping[str, object], title: str = "") -> None:
    """Print names and values in two columns; long values continue below themselves."""
    out = console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, _cell(value))
    if title:
        out.print(Text(title, style="bold"))
    out.print(grid)


def print_line(text: str = "") -> None:
    """Print one line as it is; it is never broken, so that a command in it can be copied."""
    console().print(Text(text), soft_wrap=True)


def print_wrapped(text: str) -> None:
    """Print one paragraph, broken between words."""
    console().print(Text(text))


def print_note(text: str) -> None:
    """Print one line on stderr, above a progress bar where there is one."""
    print(text, file=sys.stderr)


def warning(source: str) -> dict[str, Text]:
    """A fact to show first wherever a bundle is: that its weights are random, if they are."""
    return {} if random_seed(source) is None else {"WARNING": Text(source, style="bold red")}


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout, the only thing a command with `--json` prints there."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def size(count: float | None) -> str | None:
    """Bytes in decimal units: ``13.1 MB``."""
    return None if count is None else _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def number(count: float | None) -> str | None:
    """A count in thousands, millions …: ``5.96 M``."""
    return None if count is None else _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def figure(value: float | None, digits: int = 4) -> str | None:
    """A number with so many significant digits, without trailing zeros."""
    if value is None:
        return None
    return f"{value:.0f}" if 10**digits <= abs(value) < MANY else f"{value:.{digits}g}"


def seconds(value: float) -> str:
    """A duration: ``0.42 s``, ``12.3 s``, ``3 min 20 s``."""
    if value < 100:
        return f"{value:.3g} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def shape(sizes: Iterable[int | str] | None) -> str | None:
    """``256×1024``, or ``scalar``."""
    return None if sizes is None else "×".join(map(str, sizes)) or "scalar"


def _shorten(columns: Sequence[Column], cells: list[list[Text]], width: int) -> None:
    """Cut `shorten` columns so that the table fits: the start and the end of a name tell more than its middle."""
    widths = [max([len(c.title), *(row[i].cell_len for row in cells)]) for i, c in enumerate(columns)]
    excess = sum(widths) + GAP * (len(widths) - 1) - width
    for i, column in enumerate(columns):
        if not column.shorten or excess <= 0:
            continue
        room = max(widths[i] - excess, MIN_SHORTENED)
        excess -= widths[i] - room
        for row in cells:
            text = row[i].plain
            if len(text) > room:
                head = (room - 1) // 2
                row[i] = Text(f"{text[:head]}…{text[len(text) - (room - 1 - head) :]}")


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    text = f"{value:.0f}" if step == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{text} {units[step]}"


def _cell(value: object) -> Text:
    if value is None:
        return Text("–", style="dim")
    if isinstance(value, bool):
        return Text("✓", style="green") if value else Text("✗", style="bold red")
    return value if isinstance(value, Text) else Text(str(value))


def _finite(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
