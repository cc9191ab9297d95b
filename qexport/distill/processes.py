"""Several processes, by PyTorch's own means: ``torchrun`` starts them, each takes its share of each batch.

Every process has the whole model, and DistributedDataParallel adds the gradients up; or (`divide`) each keeps a part
of the rows of every latent weight, of its scales, gradients and moments, and FSDP2's `fully_shard` gathers a layer
where it is rounded and hands out the parts of its gradient. The teacher and the rounded weights are whole in each.

Whatever decides the course of training (the loss, the norm of the gradient, the figure on held-out samples) is reduced
over all first, so that all decide alike; numbers differ from those of one process only by the order of additions. The
first process alone writes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qexport.distill.tasks import Batch
from qexport.errors import InputError


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, over gloo; alone, do nothing."""
    wanted = launched() > 1 and not dist.is_initialized()
    if wanted:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if wanted:
            dist.destroy_process_group()


def launched() -> int:
    """How many processes ``torchrun`` said it started, whether they are joined yet or not; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def parallel(module: nn.Module) -> nn.Module:
    """The module, with gradients averaged over all processes; one whose parts were divided does so for these itself."""
    divided = any(_is_part(parameter) for parameter in module.parameters())
    return DistributedDataParallel(module) if world() > 1 and not divided else module


def divide(modules: Iterable[nn.Module]) -> None:
    """Divide the parameters of each module among the processes, by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world(),))
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # each is a root, which would else stay whole


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a part; all of them must ask."""
    shared: Any = tensor
    return shared.full_tensor() if _is_part(tensor) else tensor


def part(full: Tensor, like: Tensor) -> Tensor:
    """What of a tensor belongs to this process, as it does of `like`."""
    if not _is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    shared: Any = like
    return distribute_tensor(full, shared.device_mesh, shared.placements, src_data_rank=None)


def set_part(tensor: Tensor, full: Tensor) -> None:
    """Overwrite this process's part, or the whole, with that of `full`."""
    tensor.copy_(part(full, tensor))


def clip(parameters: Sequence[Tensor], greatest: float) -> Tensor:
    """Scale the gradients down to a norm of at most `greatest`; the norm before, over all processes, ()."""
    if not any(map(_is_part, parameters)):
        return nn.utils.clip_grad_norm_(parameters, greatest)
    parts, replicated = [], []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None and _is_part(gradient):
            parts.append(gradient.to_local())
        elif gradient is not None:
            dist.all_reduce(gradient)  # what is too small to be divided is not averaged by fully_shard
            replicated.append(gradient.div_(world()))
    squares = summed(_square(parts)) + _square(replicated)
    norm = math.sqrt(float(squares))
    for gradient in (*parts, *replicated):
        gradient.mul_(min(1.0, greatest / (norm + _NORM_FLOOR)))
    return torch.tensor(norm, dtype=torch.float64)


_NORM_FLOOR = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`: no division by zero."""


def _is_part(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`; the class is not asked for, because importing it takes as long as torch itself."""
    return hasattr(tensor, "full_tensor")


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.zeros((), dtype=torch.float64), *(t.double().square().sum() for t in tensors)]).sum()


def require_shares(size: int, count: int | None = None) -> None:
    """Nothing, if `count` processes (None: as many as were launched) can share a batch equally.

    Raises:
        InputError: they cannot.
    """
    count = launched() if count is None else count
    if size % count:
        raise InputError(f"a batch of {size} cannot be shared by {count} processes; make it a multiple of {count}")


def share(batch: Batch) -> Batch:
    """This process's part of a batch, equal for all.

    Raises:
        InputError: the batch cannot be divided.
    """
    count, size = world(), len(batch[0])
    require_shares(size, count)
    part = size // count
    return tuple(tensor[rank() * part : (rank() + 1) * part] for tensor in batch)


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each."""
    if world() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean(value: Tensor) -> Tensor:
    """The mean over all processes of a number, () float64."""
    return summed(value.detach().double()) / world()


def wait() -> None:
    """Until all processes are here: after the first has written what the others read."""
    if world() > 1:
        dist.barrier()


def is_first() -> bool:
    """Whether this process writes; true to what ``torchrun`` said also before and after the processes are joined."""
    return int(os.environ.get("RANK", "0")) == 0 if not dist.is_initialized() else dist.get_rank() == 0
