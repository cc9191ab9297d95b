"""Which form each quantised layer takes on a target, chosen by what was measured on its device.

A layer stored as codes can be run as it is stored, or as a constant weight that is dequantised when the session is made
(`passes.dense_weights`); numbers are the same. Which is faster depends on the rows M that it multiplies: at one row the
weight must be read and codes are a quarter of it; at thousands the unpacking of codes is work on top. So for every
layer the rows of all calls of a batch are found (`qexport.lower.work`), and the times of its forms summed over them:

    latency     the form that takes less time, by more than the table's spread
    memory      as stored: what is dequantised takes four to eight times the memory
    balanced    as stored, unless the other form takes less than 1 / `BALANCED_GAIN` of the time

A layer whose input is quantised, too, has a third form: the product in floating point, its input no longer rounded
(`passes.unrounded_inputs`). Where a provider has no kernel for quantised inputs, as CUDA, both others round on top of
that product and can only be slower. It changes numbers, towards the full-precision model, so it is chosen only for
`latency`, and only where the graph computes in float16: there `verify` allows as much as all rounding of inputs does
(`qexport.verify.limits`), in float32 only a share of it.

A change needs the times of both forms. A form that the table does not have is never chosen; a layer that is *stored* in
one stays as it is, since nothing says what a change would bring; and the report names what to measure. Nor is one
chosen whose gain may be noise: a form counts as faster only if its slowest round takes less than the fastest round of
the other (`device_table.Timing`). Of two that noise cannot tell apart, the one that changes less is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.formats import stored_as
from qexport.lower.work import GraphWork
from qexport.scheme import PerToken
from qexport.targets.device_table import DeviceTable, Figure
from qexport.targets.fusion import weight_of

MODES = ("latency", "memory", "balanced")

BALANCED_GAIN = 1.25
"""So many times faster a layer must become to be worth its memory."""


@dataclass(frozen=True)
class Choice:
    """One layer's: `stored` and `chosen` are forms of `qexport.targets.device_table`.

    `rows` tells in how many calls of a batch it multiplies so many rows; `us` has the time of each form in all of them,
    where it is known. `unrounded`: its input was quantised and is no longer.
    """

    layer: str
    graph: str
    weight: str
    stored: str
    chosen: str
    reason: str
    rows: Mapping[int, int] = field(default_factory=dict)
    us: Mapping[str, float] = field(default_factory=dict)
    unrounded: bool = False

    @property
    def dense(self) -> bool:
        """Whether the weight is dequantised at load."""
        return self.chosen != self.stored

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layer": self.layer, "graph": self.graph, "stored": self.stored, "chosen": self.chosen,
            "reason": self.reason, "rows": {str(rows): count for rows, count in sorted(self.rows.items())},
            "us": dict(self.us), "unrounded": self.unrounded,
        }  # fmt: skip


def choose(
    bundle: Bundle, work: Mapping[str, GraphWork], table: DeviceTable, mode: str, dtype: str
) -> tuple[Choice, ...]:
    """A choice for every quantised matrix of the bundle.

    Args:
        bundle: tells how each layer is stored.
        work: of one batch, by graph.
        table: of the device.
        mode: one of `MODES`.
        dtype: what the graphs compute in.

    Raises:
        InputError: no such mode.
    """
    if mode not in MODES:
        raise InputError(f"unknown aim {mode!r}; --optimize takes {', '.join(MODES)}")
    matrices = [row for row in bundle.manifest.layers if row.get("algorithm") and len(row.get("shape", ())) == 2]
    return tuple(_choice(row, work[str(row["graph"])], table, mode, dtype) for row in matrices)


def _choice(row: Mapping[str, Any], work: GraphWork, table: DeviceTable, mode: str, dtype: str) -> Choice:
    name, graph, weight = str(row["name"]), str(row["graph"]), weight_of(row)
    stored, dense = forms_of(row, dtype)
    rows = work.rows.get(weight, Counter[int]())

    def made(chosen: str, reason: str, us: Mapping[str, float] | None = None) -> Choice:
        unrounded = chosen == dtype != dense
        note = "; its input is no longer rounded" if unrounded else ""
        return Choice(name, graph, weight, stored, chosen, reason + note, dict(rows), us or {}, unrounded)

    if not rows:
        return made(stored, "it multiplies nothing whose rows are known")
    inputs, outputs = work.sizes[weight]

    def total(form: str, figure: Figure = "us") -> float | None:
        return _total(table, form, rows, inputs, outputs, figure)

    others = [dense]
    if dense != dtype and dtype == "float16" and mode == "latency":
        others.append(dtype)
    times = {form: round(time, 2) for form in (stored, *others) if (time := total(form)) is not None}
    if mode == "memory":
        return made(stored, "codes take the least memory", times)
    unknown = [form for form in (stored, *others) if form not in times]
    lacking = f"the table has no {' and no '.join(unknown)}" if unknown else ""
    known = [form for form in others if form in times]
    if stored not in times or not known:
        return made(stored, lacking, times)
    # What the table cannot tell apart stays as it is: no memory is paid for noise, and the next table says the same.
    best = stored
    for form in known:
        if _less(total(form, "high_us"), total(best, "low_us")):
            best = form
    fastest = min(known, key=times.__getitem__)
    reason = _reason(stored, best, fastest, times, total)
    if mode == "balanced" and best != stored and times[stored] < BALANCED_GAIN * times[best]:
        gain = times[stored] / times[best]
        best, reason = stored, f"{best} would be {gain:.2f} times as fast, too little for its memory"
    return made(best, "; ".join(filter(None, (reason, lacking))), times)


def _reason(
    stored: str, best: str, fastest: str, times: Mapping[str, float], total: Callable[[str, Figure], float | None]
) -> str:
    """Why `best` is taken; `fastest` is the one of the others with the least time."""
    gain = times[stored] / times[fastest]
    if best != stored:
        return f"{times[stored] / times[best]:.2f} times as fast as {stored}"
    if gain <= 1:
        return f"as stored it takes {gain:.2f} of the time of {fastest}"
    low, high = total(stored, "low_us"), total(fastest, "high_us")
    assert low is not None  # both forms are in the table
    assert high is not None
    doubt = f"{fastest} {gain:.2f} times as fast, up to {gain * high / low:.2f} may be noise"
    return f"within the spread: kept as stored ({doubt})"


def _less(time: float | None, other: float | None) -> bool:
    return time is not None and other is not None and time < other


def forms_of(row: Mapping[str, Any], dtype: str) -> tuple[str, str]:
    """The form of a layer of the manifest's table as it is stored, and that of its dequantised weight."""
    form, group, activation = str(row["format"]), row.get("group_size"), row.get("activation_format")
    kind = stored_as(form)
    if activation is None:
        return f"{kind}-b{group}" if group else f"{kind}-channel", dtype
    scales = "token" if row.get("activation_scales") == str(PerToken()) else "static"
    kind = "fp8" if kind.startswith("fp8") else kind
    stored = f"{kind}-{scales}" if kind == _kind(activation) else f"{kind}-with-{activation}-{scales}"
    return stored, f"{_kind(activation)}-{scales}-folded"


def _kind(activation: object) -> str:
    return "fp8" if str(activation).startswith("fp8") else str(activation)


def _total(
    table: DeviceTable, form: str, rows: Mapping[int, int], inputs: int, outputs: int, figure: Figure = "us"
) -> float | None:
    """Microseconds of all calls of a batch; a bound is that of calls that are all as fast, or slow, as they may be."""
    times = [(table.time_us(form, count, inputs, outputs, figure), calls) for count, calls in rows.items()]
    known = [(time, calls) for time, calls in times if time is not None]
    return sum(time * calls for time, calls in known) if len(known) == len(times) else None


def summary(choices: Sequence[Choice]) -> dict[tuple[str, str, str], int]:
    """How many layers made which choice for which reason; numbers in reasons are those of the first."""
    found: dict[tuple[str, str, str], int] = {}
    firsts: dict[tuple[str, str, str], str] = {}
    for choice in choices:
        key = (choice.graph, choice.stored, choice.chosen)
        reason = firsts.setdefault(key, choice.reason)
        found[choice.stored, choice.chosen, reason] = found.get((choice.stored, choice.chosen, reason), 0) + 1
    return found
