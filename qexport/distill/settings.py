"""How a student is trained: everything that decides the result, so that equal settings give equal weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from qexport.distill.losses import Distillation
from qexport.errors import InputError

JUDGE_BATCH = 16
"""Held-out samples that go through teacher and student at once."""


@dataclass(frozen=True)
class DistillSettings:
    """Settings of `qexport.distill.distill`.

    Args:
        loss: what is minimised, for models that draw tokens; denoisers have squared error.
        steps: updates, each of `batch` samples; the rate falls to 0 along half a cosine.
        warmup: steps over which the rate rises to its full height first.
        batch: samples of an update, over all processes together.
        lr: rate of the weights, relative to the rms of each matrix; None follows from the layer's error, and so do the
            next two (`qexport.distill.rates`).
        scale_lr: rate of the scales, relative to the rms of each layer's; 0 keeps them as they are.
        rest_lr: rate of the parameters that are not quantised (biases, embeddings, adaptive norms, the head), relative
            to the rms of each; 0 keeps them as they are.
        clip: greatest norm of the gradient; 0 does not clip.
        ema: keep a running mean of weights and scales with this decay and judge and export that; 0 keeps none.
        scale_weights: of the losses of VAR's scales; None counts every token alike.
        samples: that the teacher draws, where no data are given; of which `held_out` are kept for judging.
        held_out: see `samples`.
        per_trajectory: noisy latents kept of each of a denoiser's trajectories.
        unconditional: share of the labels replaced by the null class.
        evaluate_every: steps between judgements on the held-out samples; the best so far is what is returned.
        patience: judgements without a better one after which training stops; 0 never stops early.
        checkpoint_every: steps between checkpoints, where there is a place for them.
        seed: of the samples and of their order.
        recompute: compute the blocks again in the backward pass instead of keeping their activations.
        cached: keep the teacher's outputs on disk and ask it once for each sample; four bytes for each of its numbers.
        sharded: of several processes, each keeps a part of latent weights, gradients and moments (FSDP2), instead of
            all of them (DistributedDataParallel).
        offload: keep Adam's two moments in a file of the work folder, which the system reads and writes as memory
            allows, instead of in memory; eight bytes of disk for each trained number, the same result.
        bf16: compute matrix products in bfloat16; weights, losses and the optimiser stay float32.

    Raises:
        InputError: a number out of its range.
    """

    loss: Distillation = field(default_factory=Distillation)
    steps: int = 800
    batch: int = 8
    lr: float | None = None
    scale_lr: float | None = None
    rest_lr: float | None = None
    warmup: int = 0
    clip: float = 1.0
    ema: float = 0.0
    scale_weights: tuple[float, ...] | None = None
    samples: int = 1024
    held_out: int = 64
    per_trajectory: int = 10
    unconditional: float = 0.1
    evaluate_every: int = 100
    patience: int = 0
    checkpoint_every: int = 100
    seed: int = 0
    recompute: bool = False
    cached: bool = False
    sharded: bool = False
    offload: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise InputError(f"distillation: {name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr", "scale_lr", "rest_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"distillation: {name} is {value}; it must be 0 or greater, and finite")
        for name in ("ema", "unconditional"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"distillation: {name} is {getattr(self, name)}; it must lie in 0 … 1, 1 excluded")
        if self.samples <= self.held_out:
            raise InputError(f"distillation: {self.samples} samples, {self.held_out} held out: nothing to train on")
        if self.warmup >= self.steps:
            raise InputError(
                f"distillation: warmup takes {self.warmup} of {self.steps} steps; the rate never gets there"
            )
        if self.offload and self.sharded:
            raise InputError(
                "distillation: offload and sharded exclude each other; sharded divides the moments already"
            )

    @property
    def learn_scales(self) -> bool:
        """Whether scales move."""
        return self.scale_lr != 0

    @property
    def train_rest(self) -> bool:
        """Whether what is not quantised moves."""
        return self.rest_lr != 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the manifest and for keys of checkpoints.

        `rest_lr` is left out where it is 0, so that runs that freeze the rest have the keys that they had before there
        was such a rate.
        """
        data = asdict(self)
        if not self.train_rest:
            del data["rest_lr"]
        return data

    def rate(self, step: int) -> float:
        """Factor of the rates at a step: min(1, (step + 1) / (warmup + 1)) · ½ (1 + cos(π · step / steps))."""
        return min(1.0, (step + 1) / (self.warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


_LEAST = {
    "steps": 1, "batch": 1, "samples": 2, "held_out": 1, "per_trajectory": 1, "evaluate_every": 1, "patience": 0,
    "checkpoint_every": 1, "seed": 0, "warmup": 0,
}  # fmt: skip
