"""The training loop: AdamW on all that the student trains, judged on held-out samples, resumable to the bit.

Rates are relative to the size of what they move (`qexport.distill.rates`), fall along half a cosine, and the gradient's
norm is clipped. There is no weight decay: the teacher says where the weights belong.

Nothing random happens in the loop: a batch follows from seed and step, so a checkpoint (weights, scales, optimiser,
best result so far, history, step) is all that it takes to go on exactly as if nothing had happened. What is returned is
the best by the judgements on the held-out samples, the untrained start included: training never makes it worse there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexport.distill import processes
from qexport.distill.average import Average
from qexport.distill.cached import CachedTeacher
from qexport.distill.checkpoints import Checkpoints
from qexport.distill.data import Samples
from qexport.distill.offload import OffloadedMoments
from qexport.distill.rates import groups, rates_of
from qexport.distill.recompute import computing, precision
from qexport.distill.settings import JUDGE_BATCH, DistillSettings
from qexport.distill.student import Finished, Student
from qexport.distill.tasks import Batch, Task
from qexport.errors import InputError
from qexport.numerics.quantized import QuantizedTensor
from qexport.reference.device import send
from qexport.solution import Activation

CHECKPOINT = "training.pt"

READ_EVERY = {"cpu": 1, "cuda": 10}
"""Steps after which losses are read and looked at: reading waits for a GPU to finish what it was given."""

Progress = Callable[[int, int, float, float], None]
"""Told (steps done, steps in all, loss of the last batch, latest figure on held-out samples)."""


@dataclass
class History:
    """What happened: the loss of every step, and (step, figure) of every judgement, the start's first."""

    losses: list[float] = field(default_factory=list)
    judged: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """Step and figure of the best judgement."""
        return min(self.judged, key=lambda entry: (entry[1], entry[0]))


@dataclass(frozen=True, eq=False)
class Trained:
    """The best student, and how it came about."""

    best: Finished
    history: History


class Trainer:
    """One run; `run` may be called once."""

    def __init__(
        self,
        student: Student,
        teacher: Callable[..., Tensor],
        task: Task,
        data: tuple[Samples, Samples],
        settings: DistillSettings,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """Take the student, the teacher's prediction, samples to train on and to judge by, and where to save."""
        self._student, self._teacher, self._task = student, teacher, task
        self._data, self._held = data
        self._settings, self._checkpoints = settings, checkpoints
        self._cached: CachedTeacher | None = None
        if settings.cached:
            if checkpoints is None:
                raise InputError("distillation: a cached teacher needs a folder to keep its outputs in (work)")
            self._cached = CachedTeacher(teacher, checkpoints.folder, len(self._data))
        self._device = next(student.parameters()).device
        if settings.sharded and processes.joined():
            student.divide()
        self._trained = [p for p in student.parameters() if p.requires_grad]
        self.rates = rates_of(student.errors, settings, task.error_share)
        fused = True if self._device.type == "cuda" else None  # each group has one tensor: a kernel, not a dozen
        self._optimiser = torch.optim.AdamW(groups(student, self.rates), lr=1.0, weight_decay=0.0, fused=fused)
        self._offloaded: OffloadedMoments | None = None
        if settings.offload:
            if checkpoints is None:
                raise InputError("distillation: an offloaded optimiser needs a folder to keep its moments in (work)")
            self._offloaded = OffloadedMoments(self._optimiser, checkpoints.folder)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        self._average = Average(self._trained, settings.ema) if settings.ema else None
        self._judged_by: list[Tensor] | None = None
        self.history = History()
        self._best: Finished | None = None
        self._step = self.resumed_after = 0
        self._pending: list[Tensor] = []

    def run(self, progress: Progress | None = None, resumed: Callable[[int], None] | None = None) -> Trained:
        """Train from the last checkpoint, or from the start; `resumed` is told after how many steps it goes on.

        Raises:
            InputError: the loss or the gradient is not finite, or a checkpoint cannot be read or written.
        """
        settings = self._settings
        self._restore()
        self.resumed_after = self._step
        if self._step and resumed is not None:
            resumed(self._step)
        if not self.history.judged:
            self._judge()
        model = processes.parallel(self._student)
        while self._step < settings.steps and not self._stopped():
            self._pending.append(self._update(model))
            last = self._step + 1 == settings.steps
            judged = last or (self._step + 1) % settings.evaluate_every == 0
            saved = last or (self._step + 1) % settings.checkpoint_every == 0
            read = judged or saved or len(self._pending) >= READ_EVERY.get(self._device.type, 1)
            if read:
                self._read()
            self._step += 1
            if judged:
                self._judge()
            if saved or self._stopped():
                self._save()
            if progress is not None and read:
                progress(self._step, settings.steps, self.history.losses[-1], self.history.judged[-1][1])
        assert self._best is not None
        return Trained(self._best, self.history)

    def _update(self, model: nn.Module) -> Tensor:
        """One step; loss and norm of the gradient, (2,) float64, on the device. One that is not finite moves nothing.

        Raises:
            InputError: no gradient passes through the model.
        """
        settings, step = self._settings, self._step
        batch = self._there(processes.share(self._data.batch(step, settings.batch, settings.seed)))
        with computing(self._student, settings):
            teacher = self._teach(batch, step)
            output = model(*batch)
        if not output.requires_grad:
            raise InputError("distillation: no gradient passes through the model; its family must not turn them off")
        loss = self._task.loss(output.detach() if teacher is None else teacher, output, batch)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        found = torch.stack(
            (processes.mean(loss), processes.clip(self._trained, settings.clip or math.inf).to(self._device).double())
        )
        if self._device.type == "cpu" and not bool(found.isfinite().all()):
            return found  # `_read` raises
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * settings.rate(step)
        self._optimiser.step()
        if self._average is not None:
            self._average.update()
        return found

    def _there(self, batch: Batch) -> Batch:
        """The tensors of a batch on the student's device."""
        return tuple(send(tensor, self._device) for tensor in batch)

    def _read(self) -> None:
        """Note the losses of the steps since the last call; `_step` counts those before the latest.

        Raises:
            InputError: one is not finite.
        """
        first = self._step + 1 - len(self._pending)
        for number, (loss, norm) in enumerate(torch.stack(self._pending).tolist()):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise InputError(self._diverged(loss, norm, first + number))
            self.history.losses.append(loss)
        self._pending.clear()

    @torch.no_grad()
    def _teach(self, batch: Batch, step: int) -> Tensor | None:
        if not self._task.needs_teacher:
            return None
        if self._cached is None:
            return self._teacher(*batch)
        numbers = self._data.numbers(step, self._settings.batch, self._settings.seed)
        return send(self._cached(processes.share((numbers,))[0], batch), self._device)

    @torch.no_grad()
    def _judge(self) -> None:
        """Measure the student on the held-out samples, and keep it if it is the best so far."""
        if self._average is not None:
            self._average.swap()
        with self._student.stored():
            self._judge_stored()
        if self._average is not None:
            self._average.swap()

    def _judge_stored(self) -> None:
        total = torch.zeros(2, dtype=torch.float64, device=self._device)
        batches = list(self._held.batches(JUDGE_BATCH))
        for first in range(0, len(batches), processes.world()):
            number = first + processes.rank()
            batch = self._there(
                batches[min(number, len(batches) - 1)]
            )  # a divided student computes only if all processes ask it
            with precision(self._student, self._settings):
                found = self._task.judge(self._teacher(*batch), self._student(*batch))
            total += found if number < len(batches) else 0
        errors, count = processes.summed(total).tolist()
        self.history.judged.append((self._step, errors / count))
        if self.history.best[0] == self._step:
            self._best = self._student.finish()

    def _stopped(self) -> bool:
        """Whether the last judgements were all worse than the best one before them."""
        judged = self.history.judged
        number = next((i for i, entry in enumerate(judged) if entry == self.history.best), 0) if judged else 0
        return 0 < self._settings.patience < len(judged) - number

    def _diverged(self, loss: float, norm: float, step: int) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        saved = self._checkpoints.folder if self._checkpoints is not None else None
        kept = f"; the last checkpoint is in {saved}" if saved is not None and (saved / CHECKPOINT).exists() else ""
        return f"distillation: {what} at step {step + 1}; lower the rate (lr {self.rates.mean:.2g}){kept}"

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        assert self._best is not None
        best = self._best
        state: dict[str, Any] = {
            "step": self._step,
            "student": self._student.state(),
            "optimiser": _gathered(self._optimiser.state_dict()),
            "average": list(map(processes.gathered, self._average.values)) if self._average is not None else [],
            "losses": self.history.losses,
            "judged": self.history.judged,
            "codes": [torch.from_numpy(found.codes) for found in best.weights.values()],
            "scales": [torch.from_numpy(found.scales) for found in best.weights.values()],
            "activation_scales": [
                torch.from_numpy(found.scale) for found in best.activations.values() if found.scale is not None
            ],
            "floats": {name: torch.from_numpy(value) for name, value in best.floats.items()},
        }
        if processes.is_first():
            self._checkpoints.save(CHECKPOINT, state)

    def _restore(self) -> None:
        state = self._checkpoints.load(CHECKPOINT) if self._checkpoints is not None else None
        if state is None:
            return
        student = self._student
        student.restore(state["student"])
        self._optimiser.load_state_dict(_divided(state["optimiser"], self._optimiser))
        if self._offloaded is not None:
            self._offloaded.adopt()
        if self._average is not None:
            self._average.values = [
                processes.part(value.to(self._device), like)
                for value, like in zip(state["average"], self._trained, strict=True)
            ]
        self.history = History(list(state["losses"]), [(int(step), float(value)) for step, value in state["judged"]])
        self._step = int(state["step"])
        weights = {
            layer: QuantizedTensor(codes.numpy(), scales.numpy(), spec)
            for layer, spec, codes, scales in zip(
                student.layers, student.specs, state["codes"], state["scales"], strict=True
            )
        }
        kept = iter(state["activation_scales"])
        activations = {
            layer: found if found.scale is None else Activation(found.spec, np.array(next(kept)), found.zero_point)
            for layer, found in student.activations.items()
        }
        floats = {name: value.numpy() for name, value in state.get("floats", {}).items()}  # older ones have none
        self._best = Finished(weights, activations, floats)


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    """The optimiser's state with all of each moment, of which each process may have a part; for the first process."""
    moments = {
        number: {name: processes.gathered(value) if isinstance(value, Tensor) else value for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": moments}


def _divided(state: dict[str, Any], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The other way round; a count of steps, which has no axes, is everybody's."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: processes.part(value, parameters[number]) if value.ndim else value for name, value in own.items()
        }
        for number, own in state["state"].items()
    }
    return {**state, "state": moments}
