"""What is made of the lines of topkld_quality.jsonl beside the rows themselves: pairs against forward KL, and levels.

Pairs: runs that differ in the loss alone have the same start, samples, batches and steps, so their figures are compared
seed by seed: d = KL(loss) / KL(forward) − 1. The table gives the mean of d over seeds, its range, and the verdict of
Student's two-sided interval at 95 % for the mean: "better" or "worse" where it lies on one side of 0, "not shown" where
it covers 0 or where there are fewer than two seeds. No correction is made for many comparisons: of twenty losses that
are no different, one is expected to be called so.

Levels: for one model, one group size and one method of post-training quantisation, log KL over bits (ternary is
log₂ 3 = 1.58) is a falling curve; straight lines join its points. A trained model of k bits has the KL that the curve
has at b bits, and gains b − k levels. Where training goes beyond the curve's last point, the gain is "at least" that.
A point that is no worse than one of more bits is left out, so that the curve falls.

DiT has the squared output error in place of KL, and one loss, hence no pairs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from scipy.stats import t as student_t

CONFIDENCE = 0.95
NO_LOSS = "none"
FORWARD = "forward"
NOT_SHOWN = "not shown"
BITS = {"ternary": math.log2(3), "W2": 2.0, "W3": 3.0, "W4": 4.0}
"""Weight-only schemes that a curve goes through; the same with " g128" for groups of 128."""

Row = Mapping[str, Any]


def figure_of(row: Row) -> float:
    """KL, or a denoiser's output error: the less the better."""
    return float(row["kl"] if "kl" in row else row["output_mse"])


def paired(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry for each (model, scheme, start, steps, data) and loss with its K: relative differences by seed."""
    found: dict[tuple[Any, ...], dict[tuple[str, Any], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["loss"] != NO_LOSS and "kl" in row:
            same = tuple(row.get(name) for name in ("model", "scheme", "start", "steps", "data"))
            found[same][row["loss"], row.get("top_k")][row["seed"]] = figure_of(row)
    entries = []
    for same, by_loss in found.items():
        forward = by_loss.get((FORWARD, None), {})
        for (loss, top_k), figures in by_loss.items():
            seeds = sorted(figures.keys() & forward.keys())
            if loss == FORWARD or not seeds:
                continue
            differences = [figures[seed] / forward[seed] - 1 for seed in seeds]
            names = dict(zip(("model", "scheme", "start", "steps", "data"), same, strict=True))
            entries.append({**names, "loss": loss, "top_k": top_k, "differences": differences, **verdict(differences)})
    return entries


def verdict(differences: Sequence[float]) -> dict[str, Any]:
    """Mean, half the width of the interval, and what it shows."""
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return {"mean": mean, "half": None, "verdict": NOT_SHOWN}
    spread = math.sqrt(sum((value - mean) ** 2 for value in differences) / (count - 1))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread / math.sqrt(count)
    if abs(mean) <= half:
        return {"mean": mean, "half": half, "verdict": NOT_SHOWN}
    return {"mean": mean, "half": half, "verdict": "better" if mean < 0 else "worse"}


def curve(rows: Iterable[Row], model: str, method: str, suffix: str) -> list[tuple[float, float]]:
    """(bits, log figure) of post-training quantisation, falling."""
    points = sorted(
        (BITS[name], math.log(figure_of(row)))
        for row in rows
        for name in BITS
        if (row["model"], row["start"], row["loss"], row["scheme"]) == (model, method, NO_LOSS, name + suffix)
    )
    falling: list[tuple[float, float]] = []
    for bits, value in reversed(points):  # from the best: whatever is no worse than a point of more bits is left out
        if not falling or value > falling[-1][1]:
            falling.append((bits, value))
    return falling[::-1]


def bits_on(points: Sequence[tuple[float, float]], figure: float) -> tuple[float, str]:
    """Bits at which the curve has this figure; ``≥`` or ``≤`` where it lies beyond the last or the first point."""
    value = math.log(figure)
    if value < points[-1][1]:
        return points[-1][0], "≥"
    if value > points[0][1]:
        return points[0][0], "≤"
    for (low, above), (high, below) in pairwise(points):
        if below <= value <= above:
            return low + (high - low) * (above - value) / (above - below), ""
    return points[-1][0], ""


def levels(rows: Sequence[Row], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Levels gained by every trained weight-only row, against the curve of each method: mean and range over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["loss"] != NO_LOSS and row["scheme"].split(" ")[0] in BITS:
            names = ("model", "scheme", "start", "loss", "top_k", "steps", "data")
            groups[tuple(row.get(name) for name in names)].append(row)
    entries = []
    for (model, scheme, start, loss, top_k, steps, data), members in groups.items():
        base, _, size = scheme.partition(" ")
        entry = {"model": model, "scheme": scheme, "start": start, "loss": loss, "top_k": top_k, "steps": steps}
        for method in methods:
            points = curve(rows, model, method, f" {size}" if size else "")
            if len(points) < 2:
                continue
            found = [bits_on(points, figure_of(row)) for row in members]
            gains = [bits - BITS[base] for bits, _ in found]
            marks = {mark for _, mark in found if mark}
            entry[method] = (sum(gains) / len(gains), min(gains), max(gains), "".join(sorted(marks)))
        entries.append({**entry, "data": data, "seeds": len(members)})
    return entries


def pairs_table(rows: Iterable[Row]) -> list[str]:
    entries = sorted(paired(rows), key=lambda e: (e["model"], e["scheme"], str(e["data"]), e["loss"], e["top_k"] or 0))
    if not entries:
        return []
    lines = [
        "## Against forward KL, in pairs",
        "",
        "Relative difference of KL, run by run with the same seed; negative is better than `forward`. ± is Student's",
        f"interval at {CONFIDENCE:.0%}; where it covers 0 a difference is not shown.",
        "",
        "| model | scheme | data | loss | K | seeds | mean | range | ± | verdict |",
        "|" + "---|" * 10,
    ]
    for entry in entries:
        values = entry["differences"]
        half = "" if entry["half"] is None else f"{entry['half']:.1%}"
        cells = (
            entry["model"], entry["scheme"], entry["data"] or "", entry["loss"], entry["top_k"] or "", len(values),
            f"{entry['mean']:+.1%}", f"{min(values):+.1%} … {max(values):+.1%}", half, entry["verdict"],
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "How often, over all settings above:", ""]
    kinds = sorted({(entry["loss"], entry["top_k"] or 0) for entry in entries})
    for loss, top_k in kinds:
        mine = [entry["verdict"] for entry in entries if (entry["loss"], entry["top_k"] or 0) == (loss, top_k)]
        name = f"`{loss}`" + (f", K {top_k}" if top_k else "")
        counts = ", ".join(f"{mine.count(kind)} {kind}" for kind in ("better", "worse", NOT_SHOWN))
        lines.append(f"- {name}: {counts}")
    return [*lines, ""]


def levels_table(rows: Sequence[Row], methods: Sequence[str] = ("rtn", "mse", "gptq")) -> list[str]:
    entries = sorted(levels(rows, methods), key=lambda e: (e["model"], e["scheme"], e["loss"], e["top_k"] or 0))
    if not entries:
        return []
    lines = [
        "## Levels",
        "",
        "How many bits more the untrained curve of each method needs for the same figure: mean (range) over seeds, by",
        "straight lines in log KL over bits. ≥: beyond the curve's last point.",
        "",
        "| model | scheme | start | loss | K | seeds | " + " | ".join(f"against {name}" for name in methods) + " |",
        "|" + "---|" * (6 + len(methods)),
    ]
    for entry in entries:
        gains = []
        for method in methods:
            if method not in entry:
                gains.append("")
                continue
            mean, low, high, mark = entry[method]
            spread = f" ({low:+.2f} … {high:+.2f})" if low < high else ""
            gains.append(f"{mark + ' ' if mark else ''}{mean:+.2f}{spread}")
        cells = (entry["model"], entry["scheme"], entry["start"], entry["loss"], entry["top_k"] or "", entry["seeds"])
        lines.append("| " + " | ".join(map(str, (*cells, *gains))) + " |")
    return [*lines, ""]
