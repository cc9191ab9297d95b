"""Rung "trajectory": full sampling runs, ONNX Runtime against the quantised torch reference.

Two comparisons, on the same noise:

- *Teacher forced.* The reference plays; after each of its calls the ONNX graph is run on the very same inputs (the
  reference's state), and every output is compared. Errors cannot pile up, so each call is judged for itself.
- *Free.* ONNX Runtime plays by itself. A trajectory whose tokens stay identical must end in the same image. Where a
  token differs, everything after it rightly differs as well; the first difference must be excused.

Draws are judged by `qexport.verify.draws` with the error measured on the very row of logits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from qexport.errors import BundleError
from qexport.family import DrawSpec, Generator
from qexport.numerics.metrics import kl_divergence
from qexport.plan import Plan
from qexport.reference.backend import torch_player
from qexport.runtime import CallRecord, Player
from qexport.runtime.inputs import label_input
from qexport.verify.checks import NOWHERE, Place
from qexport.verify.differences import Differences, rows_of
from qexport.verify.draws import Sampling, can_be_drawn

LOGIT_BYTES = 1 << 29
"""The reference's logits of one batch are kept until ONNX Runtime has played it freely; batches are cut to fit here."""


@dataclass
class Draws:
    """How draws compared. `first` names the first unexcused or inconsistent one."""

    total: int = 0
    identical: int = 0
    excused: int = 0
    unexcused: int = 0
    inconsistent: int = 0
    first: str = ""
    place: Place = NOWHERE


@dataclass
class Free:
    """How the free runs compared.

    `diverged` trajectories have an excused first difference, `unexcused` ones an unexcused one; `image_max_abs` is over
    the `identical` rest.
    """

    trajectories: int = 0
    identical: int = 0
    diverged: int = 0
    unexcused: int = 0
    image_max_abs: float = 0.0
    worst_image: int = 0
    place: Place = NOWHERE


@dataclass
class TrajectoryResult:
    """Everything that was measured on the trajectories.

    `kl` has, for each drawing call by iteration, KL(reference ‖ other) of the guided logits in nats, mean over the
    tokens of an image, one figure an image; `pictures` are the images of the first few, by side.
    """

    differences: Differences = field(default_factory=Differences)
    kl: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    draws: Draws = field(default_factory=Draws)
    free: Free = field(default_factory=Free)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def worst_kl(self) -> tuple[float, int]:
        """The greatest mean KL of a call over images, and its iteration; 0 where nothing is drawn."""
        means = {iteration: float(np.mean(values)) for iteration, values in self.kl.items()}
        worst = max(means, key=lambda i: means[i], default=0)
        return means.get(worst, 0.0), worst

    def to_json(self) -> dict[str, Any]:
        """Plain data: counts of draws and of free trajectories."""
        draws, free = self.draws, self.free
        return {
            "draws": {
                "total": draws.total,
                "identical": draws.identical,
                "excused": draws.excused,
                "unexcused": draws.unexcused,
                "inconsistent": draws.inconsistent,
            },
            "free": {
                "trajectories": free.trajectories,
                "identical": free.identical,
                "diverged_after_excused_draw": free.diverged,
                "diverged_unexcused": free.unexcused,
                "image_max_abs": free.image_max_abs if math.isfinite(free.image_max_abs) else None,
            },
        }


def labels_for(samples: int, num_classes: int) -> np.ndarray:
    """Class of each trajectory: all classes in turn, int64."""
    return np.arange(samples, dtype=np.int64) % num_classes


def compare_trajectories(
    reference: Generator,
    player: Player[Any],
    *,
    samples: int,
    batch: int,
    seed: int,
    schedule: str | None = None,
    pictures: int = 0,
    divergence: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TrajectoryResult:
    """Play `samples` trajectories on both sides and compare them; see the module.

    Args:
        reference: the quantised torch reference.
        player: the bundle's, with ``exact`` session options.
        samples: trajectories in all; trajectory i has the class i modulo the number of classes.
        batch: most at a time.
        seed: of the noise.
        schedule: one of the plan's; None takes the default.
        pictures: keep the images of so many of the first batch's trajectories.
        divergence: also measure `TrajectoryResult.kl`.
        progress: told (trajectories done, in all).

    Raises:
        BundleError: a graph fails, or does not fit the plan.
    """
    result = TrajectoryResult()
    labels = labels_for(samples, reference.entry.num_classes)
    batch = min(batch, _images_that_fit(reference))
    torch = torch_player(reference)
    if schedule is not None:
        torch, player = torch.with_schedule(schedule), player.with_schedule(schedule)
    for start in range(0, samples, batch):
        run = _Batch(reference, torch, player, result, start, divergence)
        wanted, found = run.play(labels[start : start + batch], seed)
        if start == 0 and pictures:
            result.pictures["torch, quantised"] = wanted[:pictures]
            result.pictures["ONNX Runtime, exact"] = found[:pictures]
        if progress is not None:
            progress(min(start + batch, samples), samples)
    return result


def _images_that_fit(reference: Generator) -> int:
    quality = reference.quality
    if reference.draw is None or quality is None:
        return 1 << 30
    port = next(p for p in reference.graph(reference.draw.graph).outputs if p.name == reference.draw.logits)
    vocab_size = port.shape[-1]
    assert isinstance(vocab_size, int)
    return max(1, LOGIT_BYTES // (4 * vocab_size * sum(quality.scale_lengths)))


@dataclass(frozen=True)
class _Drawn:
    """What the reference drew from in one call, (B, L, V) and (B, L), and what it drew (B, L)."""

    logits: np.ndarray
    uniform: np.ndarray
    tokens: np.ndarray
    sampling: Sampling


class _Batch:
    def __init__(
        self,
        reference: Generator,
        torch: Player[Tensor],
        player: Player[Any],
        result: TrajectoryResult,
        first: int,
        divergence: bool,
    ) -> None:
        self.draw = reference.draw
        self.extra: dict[str, tuple[str, ...]] = {}
        if reference.draw is not None:
            self.extra[reference.draw.graph] = (reference.draw.logits, reference.draw.tokens)
        if reference.denoise is not None:
            self.extra[reference.denoise.graph] = (reference.denoise.output,)
        self.player, self.result, self.first = player, result, first
        self.divergence = divergence
        self.torch = torch
        self.shapes = {spec.name: {port.name: port.shape for port in spec.outputs} for spec in reference.graphs}
        self.drawn: dict[tuple[int, int], _Drawn] = {}
        self.same = np.zeros(0, np.bool_)

    def play(self, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Both comparisons for one batch; returns the reference's images and those of the free run."""
        inputs = label_inputs(self.player.plan, labels)
        wanted = self.torch.play(
            inputs, seed=seed, first_index=self.first, observer=self._teacher_forced, extra_outputs=self.extra
        )
        self.same = np.ones(len(labels), np.bool_)
        found = self.player.play(
            inputs, seed=seed, first_index=self.first, observer=self._free, extra_outputs=self.extra
        )
        free = self.result.free
        free.trajectories += len(labels)
        free.identical += int(self.same.sum())
        for image in np.flatnonzero(self.same):
            error = float(np.abs(found[image].astype(np.float64) - wanted[image]).max())
            if not error <= free.image_max_abs:
                free.image_max_abs, free.worst_image = error, self.first + int(image)
        return wanted, found

    def _teacher_forced(self, record: CallRecord[Tensor]) -> None:
        backend = self.player.backend
        wanted = {port: value.numpy() for port, value in record.results.items()}
        ports = backend.inputs(record.graph)  # a graph that was lowered to float16 may keep its caches in it
        feeds = {
            port: backend.put(value.numpy().astype(ports[port].dtype, copy=False))
            for port, value in record.feeds.items()
        }
        results = backend.run(record.graph, feeds, tuple(wanted))
        found = {port: backend.get(value) for port, value in results.items()}
        batch = len(next(iter(found.values())))
        same = np.ones(batch, np.bool_)
        if self.draw is not None and record.graph == self.draw.graph:
            drawn = _drawn(self.draw, record.feeds, wanted)
            self.drawn[record.call, record.iteration] = drawn
            same = self._judge_draws(record, drawn, found)
        for port, value in wanted.items():
            if not np.issubdtype(value.dtype, np.floating):
                continue
            theirs = found[port]
            rows = rows_of(same, self.shapes[record.graph][port], batch)
            if rows is not None and not (self.draw and port == self.draw.logits) and theirs.shape == value.shape:
                theirs, value = theirs[rows], value[rows]  # what follows from another token may differ
            self.result.differences.add(record.graph, record.iteration, port, theirs, value)

    def _judge_draws(self, record: CallRecord[Tensor], drawn: _Drawn, found: Mapping[str, np.ndarray]) -> np.ndarray:
        """Count the draws of one call; returns which images (B,) drew all tokens alike."""
        assert self.draw is not None
        draws, tokens_BL = self.result.draws, found[self.draw.tokens]
        draws.total += drawn.tokens.size
        if self.divergence:
            pairs = zip(drawn.logits, found[self.draw.logits], strict=True)
            self.result.kl[record.iteration] += [kl_divergence(p_LV, q_LV) for p_LV, q_LV in pairs]
        right_BL = _possible(drawn, drawn.tokens, None)
        draws.inconsistent += int((~right_BL).sum())
        differs_BL = tokens_BL != drawn.tokens
        excused_BL = _possible(drawn, tokens_BL, found[self.draw.logits], only=differs_BL)
        draws.identical += int((~differs_BL).sum())
        draws.excused += int((differs_BL & excused_BL).sum())
        bad_BL = differs_BL & ~excused_BL
        draws.unexcused += int(bad_BL.sum())
        for kind, mask in (("unexcused", bad_BL), ("reference contradicts float64", ~right_BL)):
            if mask.any() and not draws.first:
                image, position = (int(i) for i in np.argwhere(mask)[0])
                draws.first = f"trajectory {self.first + image}, position {position}: {kind}"
                draws.place = Place(record.graph, self.draw.tokens, record.iteration)
        return ~differs_BL.any(axis=1)

    def _free(self, record: CallRecord[Any]) -> None:
        if self.draw is None or record.graph != self.draw.graph:
            return
        drawn = self.drawn.pop((record.call, record.iteration), None)
        if drawn is None:
            raise BundleError(f"the plan calls graph {record.graph!r} more often than the model's; quantise again")
        tokens_BL = self.player.backend.get(record.results[self.draw.tokens])
        logits_BLV = self.player.backend.get(record.results[self.draw.logits])
        differs_BL = (tokens_BL != drawn.tokens) & self.same[:, None]
        # Tokens of one call are drawn independently, so each difference in it is a first one.
        excused_BL = _possible(drawn, tokens_BL, logits_BLV, only=differs_BL)
        bad_B = (differs_BL & ~excused_BL).any(axis=1)
        free = self.result.free
        free.unexcused += int(bad_B.sum())
        free.diverged += int((differs_BL.any(axis=1) & ~bad_B).sum())
        if bad_B.any() and free.place == NOWHERE:
            free.place = Place(record.graph, self.draw.tokens, record.iteration)
        self.same &= ~differs_BL.any(axis=1)


def _drawn(draw: DrawSpec, feeds: Mapping[str, Tensor], results: Mapping[str, np.ndarray]) -> _Drawn:
    sampling = Sampling(
        top_k=int(feeds[draw.top_k]), top_p=float(feeds[draw.top_p]), temperature=float(feeds[draw.temperature])
    )
    return _Drawn(results[draw.logits], feeds[draw.uniform].numpy(), results[draw.tokens], sampling)


def _possible(
    drawn: _Drawn, tokens_BL: np.ndarray, logits_BLV: np.ndarray | None, only: np.ndarray | None = None
) -> np.ndarray:
    """`can_be_drawn` for the draws marked in `only` (all without it), True elsewhere.

    The logit error is the greatest in each row, from `logits_BLV` (0 without it).
    """
    mask = np.ones(tokens_BL.shape, np.bool_) if only is None else only
    verdict = np.ones(tokens_BL.shape, np.bool_)
    if mask.any():
        reference = drawn.logits[mask]
        error: Any = 0.0
        if logits_BLV is not None:
            error = np.abs(logits_BLV[mask].astype(np.float64) - reference).max(axis=-1)
        verdict[mask] = can_be_drawn(reference, drawn.uniform[mask], tokens_BL[mask], drawn.sampling, error)
    return verdict


def label_inputs(plan: Plan, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The labels as the plan's input, if it takes any."""
    port = label_input(plan)
    return {port.name: labels} if port else {}
