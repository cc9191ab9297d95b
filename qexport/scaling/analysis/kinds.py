"""Sensitivity per kind of layer: what is lost when one layer alone is rounded, put together by what the layer does.

The judge's figure is a mean over images, or for denoisers Σ error / Σ power, so that sums over layers are still made of
sums over images. All layers are judged on the same images: whether one kind costs more than another is read off the
interval of their ratio, not off their own, which hard images move alike. (A denoiser's images have a timestep each,
spread evenly; drawing images draws timesteps as well, which makes its intervals too wide rather than too narrow.)

Legend: N images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.auto.plot import kind_of
from qexport.auto.sensitivity import Sensitivity, measure_sensitivity
from qexport.compare import Judge
from qexport.compare.judge import PER_IMAGE
from qexport.family import Generator
from qexport.formats import get_format
from qexport.quantize import assign_rules
from qexport.recipe import recipe_for
from qexport.scaling.analysis.resampled import Resampled, estimate, ratio
from qexport.scheme import DEFAULT_GROUP_SIZE, PerGroup, TensorSpec, preset

FORMATS = ("int4", "int2")


@dataclass(frozen=True)
class Layer:
    """One layer's row, and what it costs image by image: Σ over images of `above` / Σ of `below`, (N,) each."""

    row: Sensitivity
    above: np.ndarray
    below: np.ndarray


@dataclass(frozen=True)
class Kind:
    """Layers of one kind in one format: `cost` is the sum of what each costs alone, `weights` are all of theirs.

    `share` is that of the cost of all kinds in this format. `over_next` is the cost of a weight over that of the kind
    with the next lower one, called `next_kind`; None for the lowest.
    """

    kind: str
    number_format: str
    layers: int
    weights: int
    cost: Resampled
    share: Resampled
    next_kind: str | None
    over_next: Resampled | None

    @property
    def per_million(self) -> Resampled:
        """Cost of a million weights."""
        return _scaled(self.cost, 1e6 / self.weights)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the cost of a million weights."""
        return {
            "kind": self.kind, "format": self.number_format, "layers": self.layers, "weights": self.weights,
            "cost": self.cost.to_json(), "cost_per_million": self.per_million.to_json(), "share": self.share.to_json(),
            "next_kind": self.next_kind, "over_next": self.over_next.to_json() if self.over_next else None,
        }  # fmt: skip


def sensitivity_of_kinds(generator: Generator, judge: Judge) -> tuple[list[Kind], list[Layer]]:
    """Every kind among the default layers in each of `FORMATS`, groups of 32, and the single layers.

    `judge` tells its figures image by image.
    """
    recipe = recipe_for(preset(4), generator.default_layers, "kinds")
    specs = [TensorSpec(get_format(name), PerGroup(DEFAULT_GROUP_SIZE)) for name in FORMATS]
    found: list[Layer] = []
    for layer in assign_rules(generator, recipe):  # one at a time: then every format is measured, none estimated
        kept: list[Mapping[str, np.ndarray]] = []

        def listen(quantised: Generator, activations: bool, kept: list[Mapping[str, np.ndarray]] = kept) -> Any:
            figures = judge(quantised, activations)
            kept.append(figures[PER_IMAGE])
            return figures

        rows = measure_sensitivity(generator, [layer], listen, specs)
        found += [Layer(row, *_terms(figures)) for row, figures in zip(rows, kept, strict=True)]
    return summed(found), found


def summed(layers: Sequence[Layer]) -> list[Kind]:
    """Single layers put together by kind and format; in each format the kind whose weights cost most comes first."""
    groups: dict[str, dict[str, list[Layer]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        groups[layer.row.spec.format.name][kind_of(layer.row.layer)].append(layer)
    found: list[Kind] = []
    for name, kinds in groups.items():
        costs = {kind: _cost(own) for kind, own in kinds.items()}
        whole = _cost([layer for own in kinds.values() for layer in own])
        weights = {kind: sum(layer.row.weights for layer in own) for kind, own in kinds.items()}
        order = sorted(costs, key=lambda kind: -float(costs[kind].value) / weights[kind])
        for kind, following in zip(order, [*order[1:], None], strict=True):
            over = None
            if following is not None:
                over = _scaled(costs[kind] / costs[following], weights[following] / weights[kind])
            share = costs[kind] / whole
            found.append(Kind(kind, name, len(kinds[kind]), weights[kind], costs[kind], share, following, over))
    return found


def _terms(figures: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What `qexport.auto.sensitivity` takes for the cost, as the two columns of a ratio."""
    if "kl" in figures:
        return figures["kl"], np.ones_like(figures["kl"])
    return figures["output_error"], figures["output_power"]


def _cost(layers: Sequence[Layer]) -> Resampled:
    """Σ over layers of max(Σ above / Σ below, 0)."""

    def combine(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.maximum(ratio(above, below), 0).sum(axis=-1)

    above_NL, below_NL = (np.stack([getattr(layer, side) for layer in layers], axis=1) for side in ("above", "below"))
    return estimate(combine, above_NL, below_NL)


def _scaled(figure: Resampled, factor: float) -> Resampled:
    return Resampled(figure.value * factor, figure.samples * factor, figure.images)
