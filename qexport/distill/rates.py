"""How fast each tensor is trained.

A rate is relative to the root mean square of the tensor that it moves: Adam moves a number by about that share of it a
step. Where the settings name none, it follows from what quantisation did to a layer, its relative error

    e = ‖Q(w) − w‖ / ‖w‖

where training starts. Weights and scales of the layer get a share of e that depends on the task (`Task.error_share`),
so that one constant serves every width and format: fine codes want small steps, coarse ones great steps. What is not
quantised gets `REST_SHARE` of the mean rate of the layers. The constants are measured (docs/topkld.md, "The rates"),
not from a paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qexport.distill import processes
from qexport.distill.settings import DistillSettings
from qexport.distill.student import Student

REST_SHARE = 0.7
"""Of the mean rate of the layers, the rate of what is not quantised."""


@dataclass(frozen=True)
class Rates:
    """Relative rates of a run: by layer of its weights and of its scales, and of all that is not quantised."""

    weights: dict[str, float]
    scales: dict[str, float]
    rest: float

    @property
    def mean(self) -> float:
        """Of the weights, over the layers."""
        return fmean(self.weights.values())

    def to_json(self) -> dict[str, float]:
        """By the names of the settings; means over the layers."""
        return {"lr": self.mean, "scale_lr": fmean(self.scales.values()), "rest_lr": self.rest}


def rates_of(errors: Mapping[str, float], settings: DistillSettings, share: float) -> Rates:
    """What the settings say, or what follows from the error of each layer, of which there is at least one."""
    own = {layer: share * error for layer, error in errors.items()}
    weights, scales = (
        own if given is None else dict.fromkeys(own, given) for given in (settings.lr, settings.scale_lr)
    )
    rest = REST_SHARE * fmean(own.values()) if settings.rest_lr is None else settings.rest_lr
    return Rates(weights, scales, rest)


def groups(student: Student, rates: Rates) -> list[dict[str, Any]]:
    """One group of the optimiser for each tensor that is trained, with its absolute rate."""
    found = [
        *zip(student.latents, rates.weights.values(), strict=True),
        *zip(student.scales, rates.scales.values(), strict=True),
        *zip(student.activation_scales, (rates.scales[layer] for layer in student.scaled), strict=True),
        *((tensor, rates.rest) for tensor in student.rest),
    ]
    return [
        {"params": [tensor], "lr": rate * float(processes.whole(tensor.detach()).square().mean().sqrt())}
        for tensor, rate in found
        if tensor.requires_grad
    ]
