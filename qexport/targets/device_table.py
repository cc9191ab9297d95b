"""How long a layer takes in each form on one device, measured: what `lower --optimize` chooses by.

A form is what multiplies by the weight [K, N], K inputs and N outputs, on M rows:

    float32, float16     a constant weight in the type that the graph computes in
    int4-b32, int8-channel …   weight-only codes that the provider fuses (MatMulNBits), by block or per channel; ternary
                         codes are int2-b32 and so on
    int8-static          int8 weights and activations of a known scale, as the provider runs them
    int8-static-folded   the same Q/DQ on activations in front of a constant weight that was dequantised at load
    fp8-static           fp8 weights and activations of a known scale, as the provider runs them
    fp8-static-folded    as int8-static-folded

A time is the median of the medians of several rounds; the least and the greatest of these bound what noise can do.

Tables that come with qexport lie in `tables/`; ``qexport bench --calibrate-device`` measures one for a device.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qexport.errors import InputError

TABLES = Path(__file__).parent / "tables"
DEFAULTS = {"cuda": "h100"}
"""The table that counts for a provider where the device has none of its own."""

FOLDER_VARIABLE = "QEXPORT_DEVICES"
VERSION = 1


ASSUMED_SPREAD = 0.025
"""A time may be off by this share either way where the table has no rounds, as tables of earlier versions.

Of such a table, measured on an H100: float16 took 19.625, 20.0 and 20.25 µs at 2, 16 and 128 rows, where the launch
counts and not the rows: 3.2 % between times that should be one, so 1.6 % either way. Half as much again, since three
times do not show the widest spread. Two forms must then differ by a factor of 1.025 / 0.975 = 1.051.
"""


@dataclass(frozen=True)
class Timing:
    """One form of a layer [inputs, outputs] on so many rows: microseconds, median.

    `least_us` and `greatest_us` are the fastest and the slowest round's; None where there were no rounds.
    """

    form: str
    rows: int
    inputs: int
    outputs: int
    us: float
    least_us: float | None = None
    greatest_us: float | None = None

    @property
    def low_us(self) -> float:
        """The least that it may take."""
        return self.us * (1 - ASSUMED_SPREAD) if self.least_us is None else self.least_us

    @property
    def high_us(self) -> float:
        """The most that it may take."""
        return self.us * (1 + ASSUMED_SPREAD) if self.greatest_us is None else self.greatest_us

    @property
    def possible(self) -> bool:
        """Whether the figures can be times."""
        given = [us for us in (self.least_us, self.us, self.greatest_us) if us is not None]
        return self.rows > 0 and all(us > 0 for us in given) and given == sorted(given)

    def to_json(self) -> dict[str, Any]:
        """Plain data; without the rounds' where there were none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Figure = Literal["us", "low_us", "high_us"]
"""Which of a timing's: the median, or one of its bounds."""


@dataclass(frozen=True)
class DeviceTable:
    """Measured times of one device; `source` says how they were measured."""

    device: str
    provider: str
    source: str
    timings: tuple[Timing, ...]

    @cached_property
    def forms(self) -> frozenset[str]:
        """The forms that were measured."""
        return frozenset(timing.form for timing in self.timings)

    def by_shape(self, figure: Figure = "us") -> dict[tuple[str, int, int], dict[int, float]]:
        """(form, inputs, outputs) → rows → microseconds."""
        found: dict[tuple[str, int, int], dict[int, float]] = {}
        for t in sorted(self.timings, key=lambda t: t.rows):
            found.setdefault((t.form, t.inputs, t.outputs), {})[t.rows] = getattr(t, figure)
        return found

    def time_us(self, form: str, rows: int, inputs: int, outputs: int, figure: Figure = "us") -> float | None:
        """An estimate for a layer that was not measured itself; None if the form was not.

        From the measured shape whose number of weights is nearest, in proportion to the number of weights; between
        measured rows on a straight line in logarithms, below the fewest as there, above the most in proportion. The
        same scaling holds for all forms, so what is chosen depends on how forms compare at that shape and those rows.
        """
        if form not in self.forms or rows < 1:
            return None
        shapes = [(k, n) for name, k, n in self.by_shape() if name == form]
        k, n = min(shapes, key=lambda shape: abs(math.log(shape[0] * shape[1] / (inputs * outputs))))
        times = self.by_shape(figure)[form, k, n]
        return _at(times, rows) * inputs * outputs / (k * n)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the file has it."""
        return {"version": VERSION, **asdict(self), "timings": [timing.to_json() for timing in self.timings]}

    def dumps(self) -> str:
        """The file: one timing a line."""
        head = {**self.to_json(), "timings": []}
        lines = ",\n  ".join(json.dumps(timing.to_json()) for timing in self.timings)
        return json.dumps(head, indent=1).replace('"timings": []', f'"timings": [\n  {lines}\n ]') + "\n"


def read_table(path: Path) -> DeviceTable:
    """Read a table.

    Raises:
        InputError: there is no such file, or it is not a table.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        timings = tuple(Timing(**timing) for timing in data["timings"])
        if data["version"] != VERSION or not timings or not all(t.possible for t in timings):
            raise ValueError("wrong version or figures")
        return DeviceTable(data["device"], data["provider"], data["source"], timings)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make one: bench --calibrate-device") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a table of `qexport bench --calibrate-device` ({error})") from error


def cached_path(device: str, provider: str) -> Path:
    """Where the table of a device lies: in ``$QEXPORT_DEVICES``, or ``~/.cache/qexport/devices``."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "qexport" / "devices")
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower() or 'device'}-{provider}.json"


def find_table(provider: str, devices: Iterable[str], given: Path | None = None) -> DeviceTable:
    """The table that was given, else that of one of `devices`, else the provider's default.

    Raises:
        InputError: there is none, or it is of another provider.
    """
    places = [given] if given is not None else [cached_path(device, provider) for device in devices]
    default = DEFAULTS.get(provider)
    if given is None and default is not None:
        places.append(TABLES / f"{default}.json")
    for path in places:
        if path == given or path.is_file():
            table = read_table(path)
            if table.provider != provider:
                raise InputError(f"{path}: a table of {table.provider}, and {provider} is lowered for")
            return table
    raise InputError(
        f"no table of forms for {provider} on this device; measure one: qexport bench --calibrate-device "
        f"--provider {provider}"
    )


def _at(times: Mapping[int, float], rows: int) -> float:
    known = sorted(times)
    if rows <= known[0]:
        return times[known[0]]
    if rows >= known[-1]:
        return times[known[-1]] * rows / known[-1]
    above = next(n for n in known if n >= rows)
    below = known[known.index(above) - 1]
    share = math.log(rows / below) / math.log(above / below)
    return math.exp((1 - share) * math.log(times[below]) + share * math.log(times[above]))
