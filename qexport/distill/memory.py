"""How much memory a run will take, asked before it starts.

What is kept for the backward pass is not guessed: one sample goes through the student, and the bytes that autograd
saves are counted and multiplied by the batch. To that come, each 4 bytes a trained weight, its gradient, two moments of
Adam, the rounded weight, and the running mean where there is one; and four times the model's output: the teacher's, the
student's, the loss's gradient, and that of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from qexport.distill.tasks import Batch
from qexport.errors import InputError

_BYTES = 4
_PER_WEIGHT = 4  # gradient, two moments; and the rounded weight, which every process has
_OUTPUTS = 4

_MARGIN = 1.1
"""What temporaries and the allocator add."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT, _CGROUP_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def saved_bytes(call: Callable[[], Tensor]) -> tuple[int, int]:
    """(bytes that autograd keeps of a forward pass beside parameters, bytes of its result)."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(seen.values()), result.numel() * result.element_size()


def estimate_bytes(student: nn.Module, batch: Batch, size: int, averaged: bool, parts: int = 1) -> int:
    """Bytes that training will take beyond what is held already.

    `batch` is one sample, `size` that of a batch; of `parts` processes each keeps its part of what is trained.
    """
    kept, output = saved_bytes(lambda: student(*batch))
    weights = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    shared = weights * _BYTES  # the rounded weights are among what is kept, and do not grow with the batch
    per_sample = max(kept - shared, 0) + _OUTPUTS * output
    kept_by_all = weights * _BYTES
    divided = weights * _BYTES * (_PER_WEIGHT - 1 + averaged) // parts
    return int(_MARGIN * (kept_by_all + divided + size * per_sample))


def available_bytes() -> int | None:
    """Memory to be had without swapping, within the container's limits; None where the system does not say."""
    found = []
    try:
        line = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
        found.append(int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USE.read_text()))
    except (OSError, ValueError, StopIteration):  # not Linux, or no limit ("max")
        pass
    return min(found, default=None)


def require_memory(needed: int, processes: int = 1) -> None:
    """Nothing, if there is enough, or nobody knows.

    Raises:
        InputError: there is too little.
    """
    available = available_bytes()
    if available is not None and needed * processes > available:
        many = f" in each of {processes} processes" if processes > 1 else ""
        raise InputError(
            f"distillation needs about {needed / 1e9:.1f} GB{many}, {available / 1e9:.1f} GB are free; "
            "make the batch smaller (--batch) or, from Python, compute blocks twice (recompute)"
        )
