"""Several processes, by PyTorch's own means: ``torchrun`` starts them, each takes its share of each batch.

On CPUs they speak over gloo; on CUDA over NCCL, and process ``LOCAL_RANK`` of a host has GPU ``LOCAL_RANK`` to itself.

Every process has the whole model, and DistributedDataParallel adds the gradients up; or (`divide`) each keeps a part
of the rows of every latent weight, of its scales, gradients and moments, and FSDP2's `fully_shard` gathers a layer
where it is rounded and hands out the parts of its gradient. The teacher and the rounded weights are whole in each.

Whatever decides the course of training (the loss, the norm of the gradient, the figure on held-out samples) is reduced
over all first, so that all decide alike; numbers differ from those of one process only by the order of additions. The
first process alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qexport.distill.tasks import Batch
from qexport.errors import InputError, QexportError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for another. PyTorch's own 10 (NCCL) or 30 minutes (gloo) would end a run whose first
process draws samples or writes a bundle for longer. A process that dies is noticed by ``torchrun``, not by waiting."""


@contextmanager
def process_group(device: str = "cpu") -> Iterator[None]:
    """Join the processes that ``torchrun`` started; alone, do nothing.

    NCCL's processes part together, so one that fails does not wait for the others to part: it ends, and ``torchrun``
    ends them.
    """
    wanted = launched() > 1 and not joined()
    if wanted:
        join(device)
    through = False
    try:
        yield
        through = True
    finally:
        if wanted and (through or device == "cpu"):
            dist.destroy_process_group()


def join(device: str) -> None:
    """Join the processes that ``torchrun`` started, be it one: over gloo, or over NCCL with a GPU for each."""
    place = own_device(device)
    if place.type == "cpu":
        dist.init_process_group("gloo", timeout=PATIENCE)
        return
    torch.cuda.set_device(place)  # where tensors go that are sent to "cuda" without a number, FSDP2's among them
    dist.init_process_group("nccl", timeout=PATIENCE, device_id=place)


def joined() -> bool:
    """Whether the processes are joined, so that what one of them asks of all is answered."""
    return dist.is_initialized()


def own_device(device: str) -> torch.device:
    """Where this process computes: of several GPUs its own."""
    if device == "cpu" or not (launched() > 1 or "LOCAL_RANK" in os.environ):
        return torch.device(device)
    return torch.device(device, _local_rank())


def require_gpus(option: str) -> None:
    """Nothing, if each process of this host has a GPU to itself, and they can speak to each other.

    Raises:
        InputError: there are fewer GPUs, or this PyTorch has no NCCL. `option` is what the user calls the choice.
    """
    count, gpus = local_count(), torch.cuda.device_count()
    if max(count, _local_rank() + 1) > gpus:
        raise InputError(
            f"{option} cuda: {count} processes on this host, {gpus} GPU{'s' * (gpus != 1)}; each takes one of its own: "
            f"start {gpus} (torchrun --nproc-per-node {gpus})"
        )
    if launched() > 1 and not dist.is_nccl_available():
        raise InputError(f"{option} cuda: this PyTorch has no NCCL, over which several processes speak; start one")


def local_count() -> int:
    """How many of the processes run on this host; all of them, if nobody says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched()))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def sharing(device: str) -> int:
    """How many processes share the memory that this one computes in: those of a host, or nobody a GPU's."""
    return local_count() if device == "cpu" else 1


def launched() -> int:
    """How many processes ``torchrun`` said it started, whether they are joined yet or not; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if joined() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if joined() else 1


def parallel(module: nn.Module) -> nn.Module:
    """The module, with gradients averaged over all processes; one whose parts were divided does so for these itself."""
    divided = any(_is_part(parameter) for parameter in module.parameters())
    return DistributedDataParallel(module) if joined() and not divided else module


def divide(modules: Iterable[nn.Module]) -> None:
    """Divide the parameters of each module among the processes, by rows, on the device where they lie."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    listed = list(modules)
    mesh = init_device_mesh(next(listed[0].parameters()).device.type, (world(),))
    for module in listed:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # each is a root, which would else stay whole


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a part; all of them must ask."""
    shared: Any = tensor
    return shared.full_tensor() if _is_part(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """As `whole`, in the CPU's memory of the first process, which writes it; nothing (0,) in the others'."""
    full = whole(tensor)
    return full.cpu() if is_first() else torch.empty(0)


def from_first(make: Callable[[], T]) -> T:
    """What the first process made, in each of them; it must be picklable.

    The others wait, so on a CPU it has their threads while it does: as many as one process alone would have, which
    gives the same numbers. What the first refuses, all refuse.
    """
    if not joined():
        return make()
    held: list[Any] = [_outcome(make) if is_first() else None]
    dist.broadcast_object_list(held, src=0)
    made, error = held[0]
    if error is not None:
        raise error
    return made


def _outcome(make: Callable[[], T]) -> tuple[T | None, QexportError | None]:
    """What was made with the threads of all processes of this host, or why not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * local_count())
    try:
        return make(), None
    except QexportError as error:
        return None, error
    finally:
        torch.set_num_threads(threads)


def part(full: Tensor, like: Tensor) -> Tensor:
    """What of a tensor belongs to this process, as it does of `like`."""
    if not _is_part(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    shared: Any = like
    return distribute_tensor(full, shared.device_mesh, shared.placements, src_data_rank=None)


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, as a plain one in the same memory."""
    shared: Any = tensor
    return shared.to_local() if _is_part(tensor) else tensor


def set_part(tensor: Tensor, full: Tensor) -> None:
    """Overwrite this process's part, or the whole, with that of `full`."""
    tensor.copy_(part(full, tensor))


def clip(parameters: Sequence[Tensor], greatest: float) -> Tensor:
    """Scale the gradients down to a norm of at most `greatest`; the norm before, over all processes, ().

    It lies where they do and is not read, so that a GPU is not waited for.
    """
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
    device = parameters[0].device
    norm = (summed(_square(parts, device)) + _square(replicated, device)).sqrt()
    factor = (greatest / (norm + _NORM_FLOOR)).clamp(max=1)
    for gradient in (*parts, *replicated):
        gradient.mul_(factor)
    return norm


_NORM_FLOOR = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`: no division by zero."""


def _is_part(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`; the class is not asked for, because importing it takes as long as torch itself."""
    return hasattr(tensor, "full_tensor")


def _square(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([zero, *(t.double().square().sum() for t in tensors)]).sum()


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
    if joined():
        values = values.clone()
        dist.all_reduce(values)
    return values


def mean(value: Tensor) -> Tensor:
    """The mean over all processes of a number, () float64."""
    return summed(value.detach().double()) / world()


def wait() -> None:
    """Until all processes are here: after the first has written what the others read."""
    if joined():
        dist.barrier()


def is_first() -> bool:
    """Whether this process writes; true to what ``torchrun`` said also before and after the processes are joined."""
    return rank() == 0 if joined() else int(os.environ.get("RANK", "0")) == 0
