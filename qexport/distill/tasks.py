"""What a model is taught, batch by batch: the next token's distribution, or a denoiser's output.

- Models that draw tokens are taught the teacher's logits under teacher forcing, position by position, by one of
  `qexport.distill.losses`. A batch is labels (B,) and tokens (B, L).
- Denoisers have no logits. Their control is the squared error of the teacher's output on noisy latents from its own
  trajectories, noise and variance channels alike, relative to the mean square of the teacher's output in the batch. A
  batch is noisy latents (B, C, h, w), timesteps (B,) and labels (B,).

Figures on held-out samples are what checkpoints are chosen by: KL(teacher‖student) in nats per token, whatever the
loss, or the relative squared error.

Legend: B samples, L tokens, V vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qexport.distill.losses import Distillation
from qexport.errors import InputError
from qexport.family import Generator

Batch = tuple[Tensor, ...]

_KL = Distillation("forward")


class Task(Protocol):
    """See module."""

    @property
    def figure(self) -> str:
        """What `judge` measures, for reports: ``kl`` or ``output_mse``."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss needs the teacher's output."""
        ...

    @property
    def error_share(self) -> float:
        """Of a layer's error, the rate of its weights (`qexport.distill.rates`)."""
        ...

    def predictor(self, generator: Generator) -> Callable[..., Tensor]:
        """The model's output from the tensors of a batch, with gradients."""
        ...

    def place_steps(self, scale_S: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """The scales of the steps, each where the input x of a layer belongs to its step."""
        ...

    def loss(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        """The mean loss of a batch, ()."""
        ...

    def judge(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Numerator and denominator, (2,) float64, of the figure: sums over batches divide to it."""
        ...


class TokenTask:
    """Teaching of a model that draws tokens."""

    figure = "kl"
    error_share = 0.017

    def __init__(self, generator: Generator, loss: Distillation, scale_weights: Sequence[float] | None = None) -> None:
        """Take the loss, and weights of the scales (None: every token counts alike; else their mean is made 1).

        Raises:
            InputError: the weights are not one per scale, are negative, or are all 0.
        """
        assert generator.quality is not None
        lengths = torch.tensor(list(generator.quality.scale_lengths))
        self._lengths = lengths
        self._loss = loss
        weights = torch.ones(len(lengths)) if scale_weights is None else torch.tensor(list(scale_weights)).float()
        good = len(weights) == len(lengths) and bool((weights >= 0).all()) and 0 < float(weights.sum()) < torch.inf
        if not good:
            raise InputError(
                f"scale weights {scale_weights}: {len(lengths)} numbers of at least 0 are needed, not all 0"
            )
        weights_L = weights.repeat_interleave(lengths)
        self._weights_L = weights_L / weights_L.mean()
        self._step_L = torch.arange(len(lengths)).repeat_interleave(lengths)

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss needs the teacher's logits."""
        return self._loss.needs_teacher

    def predictor(self, generator: Generator) -> Callable[..., Tensor]:
        """(labels, tokens) → logits (B, L, V)."""
        assert generator.quality is not None
        return generator.quality.teacher_forced_logits

    def place_steps(self, scale_S: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """One step per scale: (L, 1) for an input with positions; one without is the same at every step."""
        if x.ndim == 3 and x.shape[1] == len(self._step_L):
            self._step_L = self._step_L.to(x.device)
            return scale_S[self._step_L][:, None]
        return scale_S[0]

    def loss(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        """Mean over images and positions."""
        values_BL = self._loss(teacher, student, batch[1])
        self._weights_L = self._weights_L.to(values_BL.device)
        return (values_BL * self._weights_L).mean()

    def judge(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Σ KL(p‖q) and the number of positions."""
        values = _KL(teacher, student, teacher.argmax(-1)).double()
        return torch.stack((values.sum(), torch.full_like(values.sum(), float(values.numel()))))


class DenoiseTask:
    """Teaching of a denoiser."""

    figure = "output_mse"
    needs_teacher = True
    error_share = 0.007

    def __init__(self, generator: Generator) -> None:
        """Take the model for its steps, where it has any."""
        steps = generator.steps
        of_timestep = None if steps is None else steps.of_timestep
        self._step_of = None if of_timestep is None else torch.from_numpy(of_timestep.astype("int64"))

    def predictor(self, generator: Generator) -> Callable[..., Tensor]:
        """(noisy, t, labels) → output (B, ≥ C, h, w)."""
        assert generator.denoise is not None
        return generator.denoise.model.denoise

    def place_steps(self, scale_S: Tensor, x: Tensor, batch: Batch) -> Tensor:
        """(B, 1, …): each sample has the step of its timestep."""
        if self._step_of is None:
            raise InputError("the model does not say which step a timestep belongs to; scales per step cannot be used")
        self._step_of = self._step_of.to(x.device)
        return scale_S[self._step_of[batch[1]]].reshape(-1, *[1] * (x.ndim - 1))

    def loss(self, teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
        """Mean over samples of the squared error over the mean square of the teacher's output, all channels.

        Raises:
            InputError: shapes that differ: the teacher is not of the student's model.
        """
        if teacher.shape != student.shape:
            shapes = f"{tuple(teacher.shape)} and {tuple(student.shape)}"
            raise InputError(f"outputs of teacher and student have shapes {shapes}; they are not the same model")
        error, power = ((values.square().flatten(1).mean(1)) for values in (student - teacher, teacher))
        return (error / power).mean()

    def judge(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Σ (y − y_fp)² and Σ y_fp²."""
        return torch.stack(((student.double() - teacher.double()).square().sum(), teacher.double().square().sum()))
