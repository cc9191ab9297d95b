"""What the law says, in sentences: each with its interval, and "not shown" where the interval does not decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qexport.scaling.curves import TOTAL
from qexport.scaling.figures import FD, label_of
from qexport.scaling.fits import PowerLaw
from qexport.scaling.law import Best, Compared, Estimate, Levels, SeriesLaw, compare_series, estimate, series_law
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
    names = list(laws)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found += _compared(a, b, compare_series(laws[a].curves.get(FD, {}), laws[b].curves.get(FD, {})))
            found += _degraded(laws[a], laws[b])
    for law in laws.values():
        found += [_level(item) for item in law.levels]
        found += _best(law)
        found += _offsets(law)
        found += _fits(law)
    return found


def words(estimate: Estimate, digits: int = 3) -> str:
    """``0.74 (0.69 … 0.80)``."""
    if estimate.value is None:
        return "not defined"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}g} (no interval: undefined in too many resamples)"
    return f"{estimate.value:.{digits}g} ({estimate.low:.{digits}g} … {estimate.high:.{digits}g})"


def _compared(a: str, b: str, compared: Sequence[Compared]) -> list[Finding]:
    topic = f"{a} or {b}, at equal total bits (FD)"
    if not compared:
        return [Finding(topic, "Not measured: FD of both is needed (--fd).", False)]
    found = []
    for item in compared:
        cell = str(item.a)
        if item.log2_bits is None or item.difference.value is None:
            found.append(Finding(topic, f"{cell}: the two series reach no common size in bits.", False))
            continue
        low, high = (2**x / 8e6 for x in item.log2_bits)
        better, value = (a, b)[item.difference.sign > 0], words(item.difference)
        verdict = f"{better} is better" if item.difference.sign else "not shown which is better"
        text = f"{cell}: {verdict}; FD of {a} minus that of {b} is {value}, mean over {low:.2f}–{high:.2f} MB."
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
        found.append(Finding(topic, f"{first.cell}: {verdict}; {shares}.", gap.sign != 0))
    return found


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


def _best(law: SeriesLaw) -> list[Finding]:
    topic = f"Best width, {law.series}" + (f" ({label_of(law.quality)})" if law.quality else "")
    if law.quality is None:
        text = "Not measured: no figure tells sizes apart; --images or --fd is needed."
        return [Finding(topic, text, False)]
    found = []
    for first, last in _stretches(law.best):
        stretch = law.best[first : last + 1]
        low, high = (2**item.log2_bits / 8e6 for item in (stretch[0], stretch[-1]))
        shown = [item.gap.sign > 0 for item in stretch if item.second]
        at = f"{low:.2f}–{high:.2f} MB of weights" if high > low else f"{low:.2f} MB of weights"
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
    topic = f"Bits saved at equal quality, {law.series}" + (f" ({label_of(law.quality)})" if law.quality else "")
    found = []
    for item in law.offsets:
        if item.saved.value is None:
            text = f"{item.cell}: not shown; its curve shares no quality with full precision's, or does not fall."
        else:
            verdict = "" if item.saved.sign else "; not shown to differ from nothing"
            text = f"{item.cell}: {words(item.saved)} log₂ bits against full precision{verdict}."
        found.append(Finding(topic, text, item.saved.sign != 0))
    return found


def _fits(law: SeriesLaw) -> list[Finding]:
    topic = f"Power laws, {law.series} (round-to-nearest and full precision)"
    found = []
    for figure, fit in law.fits.items():
        name = label_of(figure)
        if not isinstance(fit, PowerLaw):
            found.append(Finding(topic, f"{name}: no fit; {fit}.", False))
            continue
        text = (
            f"{name} ≈ exp({fit.a:.3g}) · N^{-fit.alpha:.3g} · b^{-fit.beta:.3g}; residuals of ln: rms {fit.rms:.2g}, "
            f"worst {fit.worst:.2g}, R² {fit.r2:.3f}, {fit.points} points."
        )
        found.append(Finding(topic, text, True))
    return found
