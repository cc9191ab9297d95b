"""Which rows of a store belong together: those measured alike, each cell once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qexport.errors import InputError
from qexport.scaling.grid import Measurement, Run, describe
from qexport.scaling.store import Row

ON_IMAGES = "images_sha256"
_TRAINING = "topkld"


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows that were measured alike, by run; `measurement` says how, `left_out` how many were measured otherwise."""

    rows: Mapping[Run, Row]
    measurement: Mapping[str, Any]
    left_out: int

    @property
    def on_images(self) -> bool:
        """Whether real images were judged, so that cross-entropy and loss tell how good a model is."""
        return self.measurement[ON_IMAGES] is not None

    @property
    def series(self) -> list[str]:
        """Series in order of name."""
        return sorted({run.series for run in self.rows})


def select(rows: Iterable[Row], how: Measurement | None = None) -> Selection:
    """The rows measured as `how` says, or else the largest group that was measured alike; the latest of each run.

    The settings of fine-tuning do not divide groups: they say what the method is, not how it is judged.

    Raises:
        InputError: there are none.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row.settings["measurement"]), []).append(row)
    if not groups:
        raise InputError("the store holds no run; `qexport scaling` makes some")
    if how is None:
        chosen = max(groups, key=lambda name: (len(groups[name]), max(row.finished_at for row in groups[name])))
    else:
        chosen = _group(describe(how))
        if chosen not in groups:
            raise InputError("the store holds no run that was measured like this")
    latest: dict[Run, Row] = {}
    for row in sorted(groups[chosen], key=lambda row: row.finished_at):
        latest[row.run] = row
    left_out = sum(map(len, groups.values())) - len(groups[chosen])
    return Selection(latest, json.loads(chosen), left_out)


def _group(measurement: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in measurement.items() if not k.startswith(_TRAINING)}, sort_keys=True)
