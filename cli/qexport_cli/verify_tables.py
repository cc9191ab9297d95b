"""What `qexport verify` prints, from the same data as `--json`. What a report lacks is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qexport_cli.render import Column, figure, print_facts, print_line, print_table, size, warning

CHECK_COLUMNS = (
    Column("check", shorten=True),
    Column("value", right=True),
    Column("limit", right=True),
    Column(""),
    Column("where", wide_only=True, shorten=True),
)
SPEED_COLUMNS = (
    Column("batch", right=True),
    Column("median ms", right=True),
    Column("fastest", right=True),
    Column("slowest", right=True),
    Column("ms per image", right=True),
    Column("runs", right=True),
    Column("of which", fold=True),
)
BATCH_PREFIX = "batch_"


def show(data: Mapping[str, Any], path: Path, html: Path | None) -> None:
    """Print what was checked and skipped, then quality, placement and speed, then the verdict.

    `html` is the report that this run wrote, None if it wrote none (which stands on stderr, with the reason).
    """
    from qexport.verify.report_files import SKIPPED

    checks = data.get("checks", ())
    rows = [(c["name"], _number(c.get("value")), _number(c.get("limit")), c["passed"], c.get("where")) for c in checks]
    print_table(CHECK_COLUMNS, [(*row[:4], row[4] or None) for row in rows])
    facts: dict[str, object] = {
        **warning(str(data.get("source"))),
        **dict(_trajectories(data)),
        **dict(_quality(data.get("quality") or {})),
        **dict(_placement(data.get("placement") or {})),
        "bits per weight": _number(data.get("bits_per_weight")),
        "size": size(data.get("size_bytes")),
        "peak memory": size(data.get("peak_memory_bytes")),
    }
    print_line()
    print_facts({name: value for name, value in facts.items() if value is not None})
    speed = list(_speed(data.get("latency_ms") or {}))
    if speed:
        print_line()
        print_table(SPEED_COLUMNS, speed)
    print_line()
    for rung in (rung for rung in data.get("skipped", ()) if rung["name"] != SKIPPED):
        print_line(f"skipped: {rung['name']}: {rung['reason']}")
    if html is not None:
        print_line(f"report: {html}")
    held = sum(bool(check["passed"]) for check in checks)
    print_line(f"{path}: {'passed' if data.get('passed') else 'FAILED'}, {held} of {len(checks)} checks hold")


def _trajectories(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How many were compared, and by which schedule: a large model compares few unless told otherwise."""
    settings = data.get("settings") or {}
    if data.get("trajectories") and "samples" in settings:
        by = f" by {settings['schedule']}" if "schedule" in settings else ""
        yield "trajectories", f"{settings['samples']}{by}, seed {settings.get('seed')} (--samples for another number)"


def _quality(quality: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Single figures on one line, then what they were measured on, then the Fréchet distance."""
    figures = [
        f"{name} {_number(value)}" for name, value in quality.items() if isinstance(value, float) and name != "seed"
    ]
    if figures:
        yield "quality", ", ".join(figures)
        seed = "" if quality.get("seed") is None else f", seed {quality['seed']}"
        yield "measured on", f"{quality.get('source', '?')}{seed}"
    fd = quality.get("fd")
    if isinstance(fd, Mapping):
        low, high = fd["ci95"]
        yield fd["label"], f"{fd['value']:.4g} (95 %: {low:.4g} … {high:.4g}) of {fd['n']} images"


def _placement(placement: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Per graph: what the quantised layers became, and where its nodes ran, as the player runs it."""
    for name, graph in (placement.get("serve") or {}).items():
        forms = ", ".join(f"{form}×{count}" for form, count in graph.get("forms", {}).items())
        nodes = graph.get("nodes", {})
        ran = ", ".join(f"{count} nodes on {name.removesuffix('ExecutionProvider')}" for name, count in nodes.items())
        yield f"graph {name}", "; ".join(filter(None, (forms, ran)))
    if placement.get("cuda"):
        yield "CUDA", str(placement["cuda"])


def _speed(latency: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for name, parts in latency.items():
        count = name.removeprefix(BATCH_PREFIX)
        if name == count or not count.isdecimal() or "total" not in parts:
            continue
        total = parts["total"]
        graphs = ", ".join(f"{graph} {_number(part['median'])}" for graph, part in parts.items() if graph != "total")
        yield (
            count,
            *(_number(total[key]) for key in ("median", "min", "max")),
            _number(total["median"] / int(count)),
            total.get("runs"),
            graphs or None,
        )


def _number(value: object) -> str | None:
    if value is None:
        return None
    return figure(value, 3) if isinstance(value, float) else str(value)
