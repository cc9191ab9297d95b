"""What the law says, in sentences: each with its interval, and "not shown" where the interval does not decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from qexport.scaling.at_equal_bits import Compared, compare_lowest, compare_series
from qexport.scaling.axes import AXES, TOTAL, Axis
from qexport.scaling.estimate import Estimate, estimate, words
from qexport.scaling.figures import FD, label_of
from qexport.scaling.fits import Fit
from qexport.scaling.grid import KINDS, size_of
from qexport.scaling.int_or_fp import KindRatio
from qexport.scaling.law import MERITS, TOGETHER, Best, Degraded, SeriesLaw, series_law
from qexport.scaling.levels import Levels
from qexport.scaling.select import Selection


@dataclass(frozen=True)
class Finding:
    """One sentence under a heading; `shown` tells whether its interval decides."""

    topic: str
    text: str
    shown: bool


def laws_of(selection: Selection, axis: str = TOTAL) -> dict[str, SeriesLaw]:
    """The law of every series."""
    return {series: series_law(selection, series, axis) for series in selection.series}


def findings(laws: Mapping[str, SeriesLaw]) -> list[Finding]:
    """Everything that can be said."""
    found: list[Finding] = []
    for a, b in combinations(laws, 2):
        found += _at_equal_bits(laws[a], laws[b])
        found += _degraded(laws[a], laws[b])
    for law in laws.values():
        found += [_level(item) for item in law.levels]
        found += [_size_by_size(item) for item in law.levels if item.figure in MERITS and item.sizes > 1]
        found += _best(law)
        found += _offsets(law)
        found += [_kind(law.series, item) for item in law.kinds]
        found += _fits(law)
    return found


def findings_of_axis(laws: Mapping[str, SeriesLaw]) -> list[Finding]:
    """What depends on the kind of bits on the axis: series at equal bits, the best width, bits saved."""
    found = [item for a, b in combinations(laws, 2) for item in _at_equal_bits(laws[a], laws[b])]
    for law in laws.values():
        found += _best(law)
        found += _offsets(law)
    return found


def _at_equal_bits(a: SeriesLaw, b: SeriesLaw) -> list[Finding]:
    axis, first, second = AXES[a.axis], a.curves.get(FD, {}), b.curves.get(FD, {})
    topic = f"{a.series} or {b.series}, at equal {axis.words} (FD)"
    found = _compared(topic, a.series, b.series, axis, compare_series(first, second))
    lowest = compare_lowest(list(first.values()), list(second.values()))
    if lowest is None:
        return found
    low, high = map(axis.amount, lowest.log2_bits)
    sign = lowest.difference.sign
    verdict = f"{(a.series, b.series)[sign > 0]} is better" if sign else "not shown which is better"
    own, other = (", ".join(map(str, cells)) for cells in lowest.cells)
    text = (
        f"The lowest curve of each: {verdict}; FD of {a.series} ({own}) minus that of {b.series} ({other}) is "
        f"{words(lowest.difference)}, mean over {low:.2f}–{high:.2f} {axis.unit}."
    )
    return [*found, Finding(topic, text, sign != 0)]


def _compared(topic: str, a: str, b: str, axis: Axis, compared: Sequence[Compared]) -> list[Finding]:
    if not compared:
        return [Finding(topic, "Not measured: FD of both is needed (--fd).", False)]
    found = []
    for item in compared:
        cell = str(item.a)
        if item.log2_bits is None or item.difference.value is None:
            found.append(Finding(topic, f"{cell}: the two series reach no common size in bits.", False))
            continue
        low, high = map(axis.amount, item.log2_bits)
        better, value = (a, b)[item.difference.sign > 0], words(item.difference)
        verdict = f"{better} is better" if item.difference.sign else "not shown which is better"
        text = f"{cell}: {verdict}; FD of {a} minus that of {b} is {value}, mean over {low:.2f}–{high:.2f} {axis.unit}."
        found.append(Finding(topic, text, item.difference.sign != 0))
    return found


def _degraded(a: SeriesLaw, b: SeriesLaw) -> list[Finding]:
    """Which series loses less of itself, in FD and in the figure that each is judged by."""
    found = []
    for first in a.degraded:
        cell = (first.cell.number_format, first.cell.method)
        second = next(
            (
                item for item in b.degraded
                if (item.cell.number_format, item.cell.method) == cell and (item.figure == FD) == (first.figure == FD)
            ),
            None,
        )  # fmt: skip
        if second is None or first.share.value is None or second.share.value is None:
            continue
        names = dict.fromkeys(label_of(item.figure) for item in (first, second))
        topic = f"{a.series} or {b.series}: worse than their own full precision by ({' and '.join(names)})"
        gap = estimate(first.share.value - second.share.value, first.samples - second.samples)
        better = (a.series, b.series)[gap.sign > 0]
        verdict = f"{better} loses less" if gap.sign else "not shown which loses less"
        shares = f"{a.series} {_percent(first.share)}, {b.series} {_percent(second.share)}"
        text = f"{first.cell}: {verdict}; {shares}"
        if gap.sign and first.share.sign > 0 < second.share.sign:
            text += f"; {words(_times(first, second))} times as much"
        found.append(Finding(topic, text + ".", gap.sign != 0))
    return found


def _times(a: Degraded, b: Degraded) -> Estimate:
    """The greater loss as a multiple of the smaller."""
    assert a.share.value is not None
    assert b.share.value is not None
    more, less = (a, b) if a.share.value > b.share.value else (b, a)
    return estimate((more.share.value or 0.0) / (less.share.value or 1.0), more.samples / less.samples)


def _percent(share: Estimate) -> str:
    assert share.value is not None
    if share.low is None or share.high is None:
        return f"{share.value:.2%}"
    return f"{share.value:.2%} ({share.low:.2%} … {share.high:.2%})"


def _level(item: Levels) -> Finding:
    topic = f"Levels gained, {item.series} ({label_of(item.figure)})"
    step = f"{item.number_format} → {item.next_format} by {item.base}"
    head = f"{item.method} at {item.number_format}: "
    if item.gained.value is None:
        return Finding(topic, f"{head}not shown, the step {step} does not help by itself.", False)
    text = f"{head}{words(item.gained)} of the step {step}, {item.sizes} size{'s' if item.sizes > 1 else ''}"
    if not item.gained.sign:
        return Finding(topic, text + "; not shown to differ from nothing.", False)
    low, high = item.gained.low or 0.0, item.gained.high or 0.0
    whole = "more than" if low > 1 else "less than" if high < 1 else "not shown to differ from"
    return Finding(topic, f"{text}; {whole} one level.", True)


def _size_by_size(item: Levels) -> Finding:
    """The levels of each size; ``<`` or ``>`` where the interval of the difference to the size before decides."""
    topic = f"Size by size, levels gained, {item.series} ({label_of(item.figure)})"
    text = (
        f"{item.method} at {item.number_format}, of the step {item.number_format} → {item.next_format} by {item.base}:"
    )
    for number, size in enumerate(item.by_size):
        relation = {1: " < ", -1: " > ", 0: " ≈ "}[size.beyond.sign] if number else " "
        text += f"{relation}{size_of(size.model)} {words(size.gained)}"
    return Finding(topic, text + ".", any(size.beyond.sign for size in item.by_size))


def _kind(series: str, item: KindRatio) -> Finding:
    topic = f"Integer or floating point, {series} ({label_of(item.figure)})"
    text = f"{item.floating} has {words(item.ratio)} times the error of {item.integer}, by {item.method}; size by size "
    text += ", ".join(f"{size_of(model)} {words(ratio)}" for model, ratio in item.by_size.items())
    low, high = item.ratio.low, item.ratio.high
    return Finding(topic, text + ".", low is not None and high is not None and not low <= 1 <= high)


def _best(law: SeriesLaw) -> list[Finding]:
    axis = AXES[law.axis]
    at_equal = "" if law.axis == TOTAL else f" at equal {axis.words}"
    topic = f"Best width{at_equal}, {law.series}" + (f" ({label_of(law.quality)})" if law.quality else "")
    if law.quality is None:
        text = "Not measured: no figure tells sizes apart; --images or --fd is needed."
        return [Finding(topic, text, False)]
    found = []
    for first, last in _stretches(law.best):
        stretch = law.best[first : last + 1]
        low, high = (axis.amount(item.log2_bits) for item in (stretch[0], stretch[-1]))
        shown = [item.gap.sign > 0 for item in stretch if item.second]
        at = f"{low:.2f}–{high:.2f} {axis.unit}" if high > low else f"{low:.2f} {axis.unit}"
        text = f"{at}: {stretch[0].best} is lowest"
        if not shown:
            found.append(Finding(topic, text + "; no other width reaches this size.", False))
            continue
        rivals = ", ".join(dict.fromkeys(str(item.second) for item in stretch if item.second))
        share = f"{sum(shown)} of {len(stretch)} places"
        text += f"; better than the best of another width ({rivals}) for certain at {share}."
        found.append(Finding(topic, text, all(shown) and len(shown) == len(stretch)))
    return found


def _stretches(best: Sequence[Best]) -> list[tuple[int, int]]:
    """First and last index of every run of places with the same best curve."""
    found: list[tuple[int, int]] = []
    for number, item in enumerate(best):
        if found and best[found[-1][0]].best == item.best:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found


def _offsets(law: SeriesLaw) -> list[Finding]:
    unit = "log₂ bits" if law.axis == TOTAL else f"log₂ {AXES[law.axis].words}"
    kind = "Bits" if law.axis == TOTAL else AXES[law.axis].words.capitalize()
    topic = f"{kind} saved at equal quality, {law.series}" + (f" ({label_of(law.quality)})" if law.quality else "")
    found = []
    for item in law.offsets:
        if item.saved.value is None:
            text = f"{item.cell}: not shown; its curve shares no quality with full precision's, or does not fall."
        else:
            verdict = "" if item.saved.sign else "; not shown to differ from nothing"
            text = f"{item.cell}: {words(item.saved)} {unit} against full precision{verdict}."
        found.append(Finding(topic, text, item.saved.sign != 0))
    return found


def _fits(law: SeriesLaw) -> list[Finding]:
    topic = f"Power laws, {law.series}: ln y = a − α ln N − β ln b (round-to-nearest and full precision)"
    found = []
    for figure, fits in law.fits.items():
        for kinds, fit in fits.items():
            name = label_of(figure) + ("" if kinds == TOGETHER else f", {kinds} alone")
            if not isinstance(fit, Fit):
                found.append(Finding(topic, f"{name}: no fit; {fit}.", False))
                continue
            text = (
                f"{name}: a = {words(fit.a)}, α = {words(fit.alpha)}, β = {words(fit.beta)}; R² {words(fit.r2)}, "
                f"residuals of ln: rms {fit.law.rms:.2g}, worst {fit.law.worst:.2g}, {fit.law.points} points."
            )
            found.append(Finding(topic, text, True))
        found += _laws_apart(topic, figure, fits)
    return found


def _laws_apart(topic: str, figure: str, fits: Mapping[str, Fit | str]) -> list[Finding]:
    """By how much the coefficients of the two kinds differ."""
    a, b = (fits.get(kind) for kind in KINDS)
    if not isinstance(a, Fit) or not isinstance(b, Fit):
        return []
    gap = a.samples - b.samples
    alpha = estimate(a.law.alpha - b.law.alpha, gap[:, 1])
    beta = estimate(a.law.beta - b.law.beta, gap[:, 2])
    first, second = KINDS
    verdict = "the laws differ" if alpha.sign or beta.sign else "not shown to differ"
    text = f"{label_of(figure)}, {first} minus {second}: α {words(alpha)}, β {words(beta)}; {verdict}."
    return [Finding(topic, text, bool(alpha.sign or beta.sign))]
