"""What decides how a model comes out of training, and what the bundled files were trained with.

AdamW with β = (0.9, 0.95); the rate falls from `lr` to a hundredth of it along half a cosine. Learning rates, batches,
averages and weight decay are those of the bundled files, `steps` too as far as their metadata tell; for depths that
were never trained, and for FeatureNet, whose recipe is not on record, the defaults are a guess and so marked here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qexport.errors import InputError

BETAS = (0.9, 0.95)
LAST_RATE = 0.01
"""Share of `lr` that is left at the end of the cosine."""

KINDS = ("vqvae", "var", "klvae", "dit", "featurenet")
DEPTHS = range(2, 13)
"""Of VAR and DiT: heads = depth, width = 64 · depth. What is deeper is no model for 32 × 32 pixels."""


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; equal recipes on equal data give equal weights.

    Args:
        kind: one of `KINDS`.
        depth: of VAR or DiT; the others ignore it.
        steps: updates; 0 only judges.
        batch: images of an update.
        lr: greatest rate.
        weight_decay: of matrices of linear layers; everything else has none.
        ema: decay of the running mean of the weights, which is what is written; 0 writes the weights themselves.
        warmup: steps over which the rate rises first.
        clip: greatest norm of the gradient; 0 does not clip.
        seed: of weights, order, mirroring and noise.
        bf16: products in bfloat16; weights, losses, the optimiser and the choice of codes stay float32.

    Raises:
        InputError: a number out of its range.
    """

    kind: str
    depth: int
    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.0
    ema: float = 0.0
    warmup: int = 0
    clip: float = 1.0
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"training: {self.kind!r} is no kind of model; choose {', '.join(KINDS)}")
        if self.depth not in DEPTHS:
            raise InputError(f"training: depth {self.depth} is out of range; {DEPTHS[0]} … {DEPTHS[-1]} can be trained")
        for name, least in (("steps", 0), ("batch", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"training: {name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"training: {name} is {getattr(self, name)}; it must be 0 or greater, and finite")
        if not 0 <= self.ema < 1:
            raise InputError(f"training: ema is {self.ema}; it must lie in 0 … 1, 1 excluded")

    def rate(self, step: int) -> float:
        """Factor of `lr`: min(1, (i + 1)/(warmup + 1)) · (0.01 + 0.99 · ½ (1 + cos(π i / steps)))."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / (self.warmup + 1)) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the key of checkpoints."""
        return asdict(self)


_VAR_LR = {2: 1.5e-3, 3: 1.5e-3, 4: 1.2e-3, 5: 1e-3}
_VAR_STEPS = {2: 935, 3: 1360, 4: 2640, 5: 3167}
_DIT_LR = {2: 1.5e-3, 3: 1e-3, 4: 1e-3, 5: 8e-4}
_DIT_STEPS = {2: 2345, 3: 1533, 4: 3564, 5: 5335}
_DEEPER_LR, _DEEPER_VAR_STEPS, _DEEPER_DIT_STEPS = 8e-4, 4000, 7000  # a guess: the trend of the depths above


def default_recipe(kind: str, depth: int) -> Recipe:
    """The recipe of the bundled file of this kind; see the module.

    Raises:
        InputError: unknown kind, or a depth out of range.
    """
    settings: dict[str, Any] = {"batch": 512, "lr": 6e-4, "steps": 1875}
    if kind == "var":
        settings |= {
            "lr": _VAR_LR.get(depth, _DEEPER_LR), "steps": _VAR_STEPS.get(depth, _DEEPER_VAR_STEPS),
            "ema": 0.999, "weight_decay": 0.05,
        }  # fmt: skip
    elif kind == "dit":
        settings |= {
            "lr": _DIT_LR.get(depth, _DEEPER_LR), "steps": _DIT_STEPS.get(depth, _DEEPER_DIT_STEPS), "ema": 0.9995,
        }  # fmt: skip
    elif kind == "vqvae":  # 0.48 million images
        settings |= {"batch": 256, "steps": 1875}
    elif kind == "klvae":  # 0.65 million images
        settings |= {"batch": 256, "steps": 2539}
    elif kind == "featurenet":  # a guess: 30 passes through 50,000 images
        settings |= {"lr": 2e-3, "steps": 2930, "weight_decay": 0.05, "warmup": 200}
    return Recipe(kind=kind, depth=depth, **settings)
