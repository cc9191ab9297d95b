"""What is made of the lines of topkld_quality.jsonl: pairs against forward KL, levels, and goals. Arithmetic only.

Pairs: runs that differ in the loss alone have the same start, samples, batches and steps, so their figures are compared
seed by seed: d = KL(loss) / KL(forward) − 1 (agreements and cross-entropy: the difference). From the mean of d over
seeds and Student's two-sided interval at 95 % follows a verdict: "better" or "worse" where it lies on one side of 0,
"not shown" where it covers 0 or where there are fewer than two seeds. No correction is made for many comparisons: of
twenty losses that are no different, one is expected to be called so.

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
from topkld_jobs import NO_LOSS, SCHEMES, VARIED, said

CONFIDENCE = 0.95
FORWARD = "forward"
NOT_SHOWN = "not shown"
BITS = {"ternary": math.log2(3), "W2": 2.0, "W3": 3.0, "W4": 4.0}
"""Weight-only schemes that a curve goes through; the same with " g128" for groups of 128."""

GOALS = (
    ("var-c10-d2", "W2", 0.025),
    ("var-c10-d4", "ternary", 0.15),
    ("var-c10-d4", "W2", 0.05),
    ("var-c10-d4", "W3", 0.02),
)
"""Model, scheme and the KL that was aimed at."""

SETTING = ("model", "scheme", "start", "steps", "data", *VARIED)
"""What runs that are compared have in common."""

RELATIVE = ("kl", "kl_top900", "fd")
MORE_IS_BETTER = ("top1_agreement", "top900_agreement")
FD_IMAGES = 1000
"""FD of another number of images has another bias; rows with one are left out of tables."""

Row = Mapping[str, Any]


def figure_of(row: Row) -> float:
    """KL, or a denoiser's output error: the less the better."""
    return float(row["kl"] if "kl" in row else row["output_mse"])


def value_of(row: Row, name: str) -> float | None:
    """A figure by name; FD of `FD_IMAGES` images only."""
    value = row.get(name)
    if name == "fd":
        return float(value["value"]) if value is not None and value["n"] == FD_IMAGES else None
    return None if value is None else float(value)


def title_of(setting: Mapping[str, Any]) -> str:
    """What a setting has beside model and scheme, in words."""
    named = [f"{name} {said(setting[name])}" for name in VARIED if setting.get(name) is not None]
    data = "" if setting["data"] == "teacher" else f"on {setting['data']}"
    start = "" if setting["start"] == "gptq" else f"from {setting['start']}"
    return ", ".join(part for part in (f"{setting['steps']} steps", data, start, *named) if part)


def in_order(setting: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sorts by model, scheme and the rest."""
    return (setting["model"], list(SCHEMES).index(setting["scheme"]), setting.get("steps") or 0, title_of(setting))


def paired(rows: Iterable[Row], figure: str = "kl") -> list[dict[str, Any]]:
    """One entry for each `SETTING` and loss with its K: differences by seed, of `RELATIVE` figures relative ones."""
    found: dict[tuple[Any, ...], dict[tuple[str, Any], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        value = value_of(row, figure)
        if row["loss"] != NO_LOSS and "kl" in row and value is not None:
            same = tuple(row.get(name) for name in SETTING)
            found[same][row["loss"], row.get("top_k")][row["seed"]] = value
    entries = []
    for same, by_loss in found.items():
        forward = by_loss.get((FORWARD, None), {})
        for (loss, top_k), figures in by_loss.items():
            seeds = sorted(figures.keys() & forward.keys())
            if loss == FORWARD or not seeds:
                continue
            differences = [figures[seed] - forward[seed] for seed in seeds]
            if figure in RELATIVE:
                differences = [d / forward[seed] for d, seed in zip(differences, seeds, strict=True)]
            names = dict(zip(SETTING, same, strict=True))
            more = figure in MORE_IS_BETTER
            entries.append(
                {**names, "loss": loss, "top_k": top_k, "differences": differences, **verdict(differences, more)}
            )
    return entries


def verdict(differences: Sequence[float], more_is_better: bool = False) -> dict[str, Any]:
    """Mean, half the width of the interval, and what it shows."""
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return {"mean": mean, "half": None, "verdict": NOT_SHOWN}
    spread = math.sqrt(sum((value - mean) ** 2 for value in differences) / (count - 1))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread / math.sqrt(count)
    if abs(mean) <= half:
        return {"mean": mean, "half": half, "verdict": NOT_SHOWN}
    return {"mean": mean, "half": half, "verdict": "better" if (mean > 0) == more_is_better else "worse"}


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
            groups[tuple(row.get(name) for name in (*SETTING, "loss", "top_k"))].append(row)
    entries = []
    for same, members in groups.items():
        entry: dict[str, Any] = dict(zip((*SETTING, "loss", "top_k"), same, strict=True))
        base, _, size = entry["scheme"].partition(" ")
        for method in methods:
            points = curve(rows, entry["model"], method, f" {size}" if size else "")
            if len(points) < 2:
                continue
            found = [bits_on(points, figure_of(row)) for row in members]
            gains = [bits - BITS[base] for bits, _ in found]
            marks = {mark for _, mark in found if mark}
            entry[method] = (sum(gains) / len(gains), min(gains), max(gains), "".join(sorted(marks)))
        entries.append({**entry, "seeds": len(members)})
    return entries


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each goal with the best row of its model and scheme, whatever its settings; without one, ``row`` is None."""
    entries = []
    for model, scheme, limit in GOALS:
        mine = [row for row in rows if (row["model"], row["scheme"]) == (model, scheme) and row["loss"] != NO_LOSS]
        best = min(mine, key=figure_of, default=None)
        met = best is not None and figure_of(best) <= limit
        entries.append({"model": model, "scheme": scheme, "limit": limit, "row": best, "met": met})
    return entries
