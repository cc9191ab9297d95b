"""How much memory a run will take, asked before its first step.

What is kept for the backward pass is not guessed: one sample, and then two, go through the student, in the precision of
training and with blocks computed again where the settings say so, and the bytes that autograd saves are counted. What
the second sample adds grows with the batch, the rest (weights in bfloat16) does not. To that come

- each 4 bytes a trained number: its gradient and two moments of Adam (unless those are in a file), the running mean
  where there is one; of several processes that divide these each has its part;
- of what is trained beside the quantised matrices the same, undivided, and three numbers more: what it held before it
  was judged, the best result and the one that may replace it;
- the rounded weights, and the codes of the best result and of the one that may replace it, whole in every process;
- four times the model's output for a batch: the teacher's, the student's, the loss's gradient, and that of the logits;
  or twice for a batch of judging, where that is more.

What can be said before there is a student, from shapes alone, is in `qexport.distill.least`.

What lies in mapped files (moments that are offloaded, a cached teacher) is not counted: it gives way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qexport.distill.recompute import computing
from qexport.distill.settings import JUDGE_BATCH, DistillSettings
from qexport.distill.student import Student
from qexport.distill.tasks import Batch
from qexport.errors import InputError

_BYTES = 4
_GRADIENT, _MOMENTS = 1, 2  # float32 numbers for each that is trained
_CODES = 2  # bytes: one for the best, one for what may replace it
_COPIES = 3  # of what is not quantised: put aside while it is judged, the best, and what may replace that
OUTPUTS, _JUDGED_OUTPUTS = 4, 2

_MARGIN = 1.1
"""What temporaries and the allocator add."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT, _CGROUP_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def saved_bytes(call: Callable[[], Tensor], apart: Callable[[], Sequence[Tensor]] = list) -> tuple[int, int]:
    """(bytes that autograd keeps of a forward pass, bytes of its result).

    Parameters do not count, nor does what `apart` gives after the pass.
    """
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    others = {tensor.untyped_storage().data_ptr() for tensor in apart()}
    kept = sum(size for place, size in seen.items() if place not in others)
    return kept, result.numel() * result.element_size()


def estimate_bytes(
    student: nn.Module, sample: Batch, settings: DistillSettings, processes: int = 1, held_out: int = 1
) -> int:
    """Bytes that training will take in each process beyond what is held already.

    `sample` holds one sample; `held_out` is how many are judged by.
    """
    one = tuple(tensor.clone() for tensor in sample)  # a slice would be counted with all that it was cut from
    two = tuple(torch.cat((tensor, tensor)) for tensor in one)
    share = settings.batch // processes
    rounded: Callable[[], Sequence[Tensor]] = (lambda: student.rounded) if isinstance(student, Student) else list
    place = next(student.parameters()).device
    one, two = (tuple(tensor.to(place) for tensor in batch) for batch in (one, two))
    with computing(student, settings, kept_whole=1):
        kept, output = saved_bytes(lambda: student(*one), rounded)
        by_sample = kept
        if share > 1:  # a model that barely fits one sample is not shown two
            by_sample = max(saved_bytes(lambda: student(*two), rounded)[0] - kept, 0)
    fixed = max(kept - by_sample, 0)
    rest = sum(parameter.numel() for parameter in student.rest) if isinstance(student, Student) else 0
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad) - rest
    state = state_bytes(trained, settings, processes) + rest_bytes(rest, settings)
    update = share * (by_sample + OUTPUTS * output)
    judging = min(JUDGE_BATCH, held_out) * _JUDGED_OUTPUTS * output
    return int(_MARGIN * (state + fixed + max(update, judging)))


def state_bytes(trained: int, settings: DistillSettings, processes: int = 1) -> int:
    """Bytes in each process of what training keeps of `trained` numbers beside these themselves."""
    parts = processes if settings.sharded else 1
    return trained * (_BYTES + _CODES) + trained * _BYTES * _numbers(settings) // parts


def rest_bytes(trained: int, settings: DistillSettings) -> int:
    """Bytes in each process of what training keeps of `trained` numbers that are not quantised, beside these."""
    return trained * _BYTES * (_numbers(settings) + _COPIES)


def _numbers(settings: DistillSettings) -> int:
    """Numbers that an update needs for each that is trained."""
    return _GRADIENT + (0 if settings.offload else _MOMENTS) + (1 if settings.ema else 0)


def available_bytes(device: str = "cpu") -> int | None:
    """Memory to be had without swapping, within the container's limits, or a GPU's; None where nobody says."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
        found.append(int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USE.read_text()))
    except (OSError, ValueError, StopIteration):  # not Linux, or no limit ("max")
        pass
    return min(found, default=None)


def require_memory(
    needed: int, settings: DistillSettings, processes: int = 1, device: str = "cpu", *, least: bool = False
) -> None:
    """Nothing, if there is enough for each of the processes that share the memory, or nobody knows.

    `least` says that `needed` is a lower bound, which counts nothing that could be computed again.

    Raises:
        InputError: there is too little; it says what would take less.
    """
    available = available_bytes() if device == "cpu" else available_bytes(device)
    if available is None or needed * processes <= available:
        return
    many = f" in each of {processes} processes" if processes > 1 else ""
    rest = {
        "recompute": not (settings.recompute or least),
        "offload": device == "cpu" and not (settings.offload or settings.sharded),
        "rest_lr=0": settings.train_rest and not least,
    }
    advice = ["make the batch smaller (--batch)", *(f"--train {name}" for name, helps in rest.items() if helps)]
    about = "at least" if least else "about"
    wanted = f"distillation needs {about} {needed / 1e9:.1f} GB{many}, {available / 1e9:.1f} GB are free"
    raise InputError(f"{wanted}; {', or '.join(advice)}")
