"""Adam's moments in a file instead of in memory, for models whose optimiser does not fit.

A trained number costs four bytes each for itself, its gradient, two moments and its rounded value. The moments are
touched once a step, one tensor after the other, so they can lie in a file that is mapped into memory: the system keeps
what there is room for and writes back the rest. The arithmetic is that of memory, bit for bit; what it costs is the
disk's speed, 16 bytes a number and step where nothing stays in memory. A file system that is itself memory (tmpfs)
saves nothing.

The file loses its name as soon as it is mapped, so that it goes away with the process however that ends. A checkpoint
holds the moments like all else.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from qexport.distill import processes
from qexport.errors import InputError

FILE = "moments.{rank}.f32"
MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES = 4


class OffloadedMoments:
    """Takes the place of the state that an optimiser has not made yet."""

    def __init__(self, optimiser: torch.optim.AdamW, folder: Path) -> None:
        """Make the file and hand its parts to `optimiser`, whose parameters are float32, whole, and not yet moved.

        Raises:
            InputError: the disk has no room, the file cannot be made, or the parameters lie on CUDA.
        """
        self._optimiser = optimiser
        if any(parameter.is_cuda for group in optimiser.param_groups for parameter in group["params"]):
            raise InputError("distillation: offload keeps moments in the CPU's memory; leave it out on CUDA")
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        count = len(MOMENTS) * sum(parameter.numel() for parameter in parameters)
        path = folder / FILE.format(rank=processes.rank())
        try:
            with path.open("wb") as handle:
                _reserve(handle.fileno(), count * BYTES)
            flat = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path}: no place for {count * BYTES / 1e9:.1f} GB of the optimiser's moments ({error}); choose "
                "another folder, or do not offload"
            ) from error
        finally:
            path.unlink(missing_ok=True)
        self._mapped: dict[Tensor, dict[str, Tensor]] = {}
        start = 0
        for parameter in parameters:
            self._mapped[parameter] = {}
            for name in MOMENTS:
                stop = start + parameter.numel()
                self._mapped[parameter][name] = flat[start:stop].view(parameter.shape)
                start = stop
            optimiser.state[parameter] = {"step": torch.tensor(0.0), **self._mapped[parameter]}

    @torch.no_grad()
    def adopt(self) -> None:
        """Take over what a checkpoint has put into the optimiser's state, which lies in memory."""
        for parameter, mapped in self._mapped.items():
            state = self._optimiser.state[parameter]
            for name, tensor in mapped.items():
                tensor.copy_(state[name])
                state[name] = tensor


def _reserve(file: int, size: int) -> None:
    """Give an empty file `size` bytes of zeros, where moments start, on the disk.

    A mapped file without its place there would end the process, not raise, when the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
