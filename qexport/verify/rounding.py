"""What a model with quantised inputs of layers makes of rounding errors, and the limits that follow from it.

Two runtimes sum in different orders, so x differs by about 1e-7 between them. A quantiser with step s hands that on
unless a value lies so near to the border between two codes that it flips: with a difference d this happens to a share
d/s of the values, and each flip moves one by s, so what was d before is about √(d·s) behind. With s a hundredth of x,
1e-7 becomes 3e-5 behind the first quantiser, 5e-4 behind the second, and so on towards s itself. No limit that is fixed
beforehand could tell this from a defect. But the same happens to the model alone: computed in float64 between the
quantisers, with everything else equal, it departs from itself by just as much. So that is measured, on a few of the
trajectories, and a bundle may depart from the twin by not much more:

- relative L2 of logits, states and images: `FACTOR` times the worst of its own
- KL(twin ‖ bundle) of the logits of a call: `FACTOR`² = 10 times KL(twin ‖ twin in float64), since KL grows with the
  square; draws that differ with an excuse: as many times the share, counting one more than were seen
- where that is next to nothing, because no code flipped on so few trajectories: a `SHARE` of what all of the rounding
  does, the departure of the twin from itself without quantisers. It is the sum of N errors of variance s²/12; one flip
  is an error of s, so it does √(12/N) of that, a tenth for N = 1200 values in front of quantisers (a call has more).

These limits are loose; the proof rests on the rungs beside this one: the same trajectories without the rounding, under
the limits of weight-only bundles, the quantisers' scales bit for bit, and each quantised operator against float64 on
its own input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qexport.family import Generator
from qexport.reference.backend import TorchBackend, torch_player
from qexport.reference.twin import float64_of
from qexport.runtime import Player
from qexport.verify.limits import (
    EXCUSED_DRAWS,
    FP16_SHARE,
    FP32_IMAGE_MAX_ABS,
    FP32_LOGITS_RELATIVE_L2,
    Limits,
    widest,
)
from qexport.verify.trajectory import TrajectoryResult, compare_trajectories

FACTOR = math.sqrt(10)
"""Both departures are random and of the same kind; ten times the KL is what no second implementation needs."""

SHARE = 0.1
"""See module."""

KL_FLOOR = 1e-8
"""Nats. Logits within `FP32_LOGITS_RELATIVE_L2` of values up to 10 differ by 2e-4, half the square of which is 2e-8."""

RESPONSE_SAMPLES = 4
"""Trajectories on which departures are measured."""


@dataclass(frozen=True)
class Departures:
    """The twin against itself: `own` in float64, `whole` without quantisers of activations."""

    own: TrajectoryResult
    whole: TrajectoryResult


def measure_departures(
    rounded: Generator, unrounded: Generator, *, samples: int, seed: int, schedule: str | None
) -> Departures:
    """Both departures of the twin `rounded`, on the first `RESPONSE_SAMPLES` of the trajectories."""
    count = min(samples, RESPONSE_SAMPLES)

    def against(player: Player[Any]) -> TrajectoryResult:
        return compare_trajectories(
            rounded, player, samples=count, batch=count, seed=seed, schedule=schedule, divergence=True
        )

    # Without its quantisers the twin has no use for the scales of the step, but the plan hands them over.
    idle = Player(rounded.plan, _Deaf(rounded, unrounded), rounded.tables)
    return Departures(against(torch_player(float64_of(rounded))), against(idle))


class _Deaf(TorchBackend):
    """Runs the graphs of `unrounded`, and claims the inputs of `rounded`."""

    def __init__(self, rounded: Generator, unrounded: Generator) -> None:
        super().__init__(unrounded)
        self._inputs = {spec.name: {port.name: port for port in spec.inputs} for spec in rounded.graphs}


def half_limits_from(departures: Departures, reference: Generator, half: Limits) -> Limits:
    """The limits of rounded trajectories of graphs that compute in float16, where weight-only ones have `half`.

    Draws differ with an excuse as often as they like: half of them do, so a share would tell nothing.
    """
    return replace(widest(limits_from(departures, reference, FP16_SHARE), half), excused_draws=1.0)


def limits_from(departures: Departures, reference: Generator, share: float = SHARE) -> Limits:
    """The limits of the rounded trajectories; see module. `share` is that of the whole of the rounding."""
    own, whole = departures.own, departures.whole
    own_l2, own_image = _worst(own, reference)
    whole_l2, whole_image = _worst(whole, reference)
    relative_l2 = max(FACTOR * own_l2, share * whole_l2, FP32_LOGITS_RELATIVE_L2)
    draws = own.draws
    excused = FACTOR**2 * (draws.excused + 1) / draws.total if draws.total else 0.0
    image = max(FACTOR * own_image, share * whole_image, FP32_IMAGE_MAX_ABS)
    # Fifty steps of a diffusion sampler spread what one flip does: the end of a trajectory depends on which flips
    # happened, not on how many. All that can be asked is that it is no further off than the rounding itself makes it.
    free = max(FACTOR * own.free.image_max_abs, whole.free.image_max_abs) if reference.draw is None else 0.0
    return Limits(
        logits_relative_l2=relative_l2,
        state_relative_l2=relative_l2,
        image_max_abs=image,
        free_image_max_abs=max(free, image),
        excused_draws=max(excused, EXCUSED_DRAWS),
        kl=max(FACTOR**2 * own.worst_kl[0], share**2 * whole.worst_kl[0], KL_FLOOR),
    )


def _worst(found: TrajectoryResult, reference: Generator) -> tuple[float, float]:
    """The worst relative L2 of logits and states, and the largest difference of a decoded picture."""
    plan = reference.plan
    pictures = {
        (call.graph, port) for call in plan.calls for port, state in call.outputs.items() if state == plan.output
    }
    groups = list(found.differences.groups())
    l2 = [found.differences.worst(*group)[0] for group in groups if group not in pictures]
    image = [found.differences.max_abs(*group) for group in groups if group in pictures]
    return max(l2, default=0.0), max(image, default=0.0)
