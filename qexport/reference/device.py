"""On which device torch computes: chosen by the user, and decided by where a generator's modules lie.

Players, judges and samplers ask the generator that they are given (`device_of`), so whoever owns it moves it once and
all follow. Calibration and export read weights as arrays: they are given the model on the CPU.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qexport.errors import InputError
from qexport.family import Generator

CPU = torch.device("cpu")


def choose_device(name: str, option: str = "--provider") -> str:
    """``cpu`` or ``cuda``; ``auto`` is CUDA where torch has it. `option` is what the user calls the choice.

    Raises:
        InputError: another name, or CUDA where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"{option} {name!r} is unknown; use auto, cpu or cuda")
    there = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError(f"{option} cuda: torch sees no CUDA device here; use {option} cpu")
    return "cuda" if there else "cpu"


def device_name(device: str | torch.device) -> str:
    """``cpu``, or what the GPU is called."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)


def device_of(generator: Generator) -> torch.device:
    """Where the weights of the graphs lie."""
    for spec in generator.graphs:
        for value in (*spec.module.parameters(), *spec.module.buffers()):
            return value.device
    return CPU


def to_device(generator: Generator, device: str | torch.device) -> Generator:
    """Move everything with weights, in place: graphs, and the modules that `quality` and `denoise` hold as attributes.

    On CUDA, float32 stays float32 from then on in this process: TF32, which keeps 10 bits of each factor, is off.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    holders = (generator.quality, None if generator.denoise is None else generator.denoise.model)
    modules = [spec.module for spec in generator.graphs]
    modules += [module for spec in generator.graphs for part in spec.parts for module in part.modules]
    held = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
    modules += [value for value in held if isinstance(value, nn.Module)]
    for module in modules:
        module.to(device)
    return generator


def placed(generator: Generator, device: str | torch.device) -> Generator:
    """The generator itself where it lies there already, else a copy there."""
    here, there = device_of(generator), torch.device(device)
    same = here.type == there.type and there.index in (None, here.index)  # "cuda" is any GPU, "cuda:1" that one
    return generator if same else to_device(copy.deepcopy(generator), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; to CUDA without waiting for what is computed there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
