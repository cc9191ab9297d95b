"""Steps, running means and checkpoints; what is trained, and on what, is a `Task` and `Examples`.

A run that is cut off goes on from its last checkpoint to the very weights that it would have had: order, mirroring and
noise of a step depend on seed and step alone, and everything else is in the checkpoint. (On one machine with one number
of threads; on CUDA as far as its kernels repeat themselves, which atomic sums in some backward passes do not.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qexport.distill.average import Average
from qexport.distill.checkpoints import Checkpoints
from qexport.errors import InputError
from qexport_models.train.data import Examples, prepared, step_generator
from qexport_models.train.recipe import BETAS, Recipe
from qexport_models.train.task import LOSS, Task

CHECKPOINT, PREPARED = "training.pt", "examples.pt"
DEFAULT_CHECKPOINT_EVERY = 200
PREPARE_BATCH = 256

Progress = Callable[[int, dict[str, float]], None]
"""Told how many steps are done, and the terms of the last."""


class Trainer:
    """One run; see module."""

    def __init__(
        self,
        task: Task,
        images: Examples,
        recipe: Recipe,
        *,
        device: str = "cpu",
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = DEFAULT_CHECKPOINT_EVERY,
        encoding: Callable[[int, int], None] | None = None,
    ) -> None:
        """Move everything to the device, prepare the examples, and go to where a checkpoint left off.

        `encoding` is told (done, in all) while a frozen autoencoder goes through the images.
        """
        self._encoding = encoding
        self._task, self._recipe, self._device = task, recipe, torch.device(device)
        self._checkpoints, self._every = checkpoints, checkpoint_every
        for module in (task.module, *task.frozen()):
            module.to(self._device)
        self._examples = self._prepare(images) if recipe.steps else images
        named = dict(task.module.named_parameters())
        decayed = {
            f"{path}.weight".lstrip(".") for path, part in task.module.named_modules() if isinstance(part, nn.Linear)
        }
        groups = [
            {"params": [p for n, p in named.items() if p.requires_grad and (n in decayed) == on], "weight_decay": decay}
            for on, decay in ((True, recipe.weight_decay), (False, 0.0))
        ]
        self._optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=BETAS)
        self._trained = [p for group in groups for p in group["params"]]
        self._average = Average(self._trained, recipe.ema) if recipe.ema else None
        self.losses: list[float] = []
        self._restore()

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def run(self, progress: Progress | None = None) -> None:
        """The remaining steps; afterwards the module holds what is to be written, in evaluation mode.

        Raises:
            InputError: training diverged, or a checkpoint cannot be written.
        """
        self._task.module.train()
        while self.step < self._recipe.steps:
            terms = self._update()
            if self.step % self._every == 0 or self.step == self._recipe.steps:
                self._save()
            if progress is not None:
                progress(self.step, terms)
        if self._average is not None:
            self._average.swap()
        self._task.module.eval()

    def _update(self) -> dict[str, float]:
        recipe, step = self._recipe, self.step
        x, labels = self._examples.batch(step, recipe.batch, recipe.seed)
        rng = step_generator(recipe.seed, 2 * step)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=recipe.bf16):
            terms = self._task.terms(x.to(self._device), labels.to(self._device), rng)
        self._optimiser.zero_grad(set_to_none=True)
        terms[LOSS].backward()
        norm = nn.utils.clip_grad_norm_(self._trained, recipe.clip or math.inf)
        found = {name: float(value.detach()) for name, value in terms.items()}
        if not (math.isfinite(found[LOSS]) and math.isfinite(float(norm))):
            raise InputError(f"training: the loss is {found[LOSS]} at step {step + 1}; lower --lr ({recipe.lr:g})")
        for group in self._optimiser.param_groups:
            group["lr"] = recipe.lr * recipe.rate(step)
        self._optimiser.step()
        if self._average is not None:
            self._average.update()
        self._task.after(step, rng)
        self.losses.append(found[LOSS])
        return found

    def _prepare(self, images: Examples) -> Examples:
        """The examples; what a frozen encoder makes of them is computed once for the run and its restarts."""
        state = self._checkpoints.load(PREPARED) if self._checkpoints is not None else None
        if state is not None:
            return Examples(state["plain"], images.labels, state["mirrored"])
        if self._task.encode(images.plain[:1].to(self._device)) is None:
            return images
        found = prepared(images, self._encoded, PREPARE_BATCH, self._encoding)
        if self._checkpoints is not None:
            self._checkpoints.save(PREPARED, {"plain": found.plain, "mirrored": found.mirrored})
        return found

    def _encoded(self, pixels: Tensor) -> Tensor:
        encoded = self._task.encode(pixels)
        assert encoded is not None
        return encoded

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        state: dict[str, Any] = {
            "losses": self.losses,
            "module": self._task.module.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "average": self._average.values if self._average is not None else [],
            "task": self._task.state(),
        }
        self._checkpoints.save(CHECKPOINT, state)

    def _restore(self) -> None:
        state = self._checkpoints.load(CHECKPOINT) if self._checkpoints is not None else None
        if state is None:
            return
        self._task.module.load_state_dict(state["module"])
        self._optimiser.load_state_dict(state["optimiser"])
        if self._average is not None:
            for value, kept in zip(self._average.values, state["average"], strict=True):
                value.copy_(kept)
        self._task.restore(state["task"])
        self.losses = list(state["losses"])


@torch.no_grad()
def judge(task: Task, images: Examples, batch: int, seed: int = 0) -> dict[str, float]:
    """Mean terms over images, in evaluation mode: no label is dropped, nothing cropped; noise by `seed`."""
    was_training = task.module.training
    task.module.eval()
    sums: dict[str, float] = {}
    for number, (pixels, labels) in enumerate(images.in_order(batch)):
        device = next(task.module.parameters()).device
        encoded = task.encode(pixels.to(device))
        x = pixels.to(device) if encoded is None else encoded
        for name, value in task.terms(x, labels.to(device), step_generator(seed, 2 * number)).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(labels)
    task.module.train(was_training)
    return {name: total / len(images) for name, total in sums.items()}
