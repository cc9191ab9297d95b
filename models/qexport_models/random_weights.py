"""Modules of published shape without their files, for engineering: sizes, times and parity, never quality.

Every parameter is drawn by a generator of its own, NumPy's Philox with the first 16 bytes of SHA-256("seed/name") as
key, so that its numbers depend neither on the order nor on the threads that fill. Rules say how it is scaled:

    Fan(g)         normal, standard deviation g / √(inputs of an output): keeps activations at their size
    Normal(s, m)   normal, standard deviation s, mean m

Without a rule of the family, linear layers and convolutions get ``Fan(1)``, embeddings ``Normal(0.02)``, weights of
norms ``Normal(0.02, 1)`` and everything else ``Normal(0.02)``. Buffers keep the values that the constructor gave them.
Numbers are float32 from the start and written in place, so nothing is held twice.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ModuleT = TypeVar("ModuleT", bound=nn.Module)

DEFAULT_STD = 0.02
MAX_THREADS = 8
"""NumPy fills without holding the interpreter's lock; beyond this, memory is the limit."""


@dataclass(frozen=True)
class Fan:
    """Standard deviation `gain` / √(product of all dimensions but the first)."""

    gain: float = 1.0

    def moments(self, shape: Sequence[int]) -> tuple[float, float]:
        """(mean, standard deviation)."""
        return 0.0, self.gain / math.sqrt(math.prod(shape[1:]))


@dataclass(frozen=True)
class Normal:
    """Standard deviation `std` around `mean`."""

    std: float = DEFAULT_STD
    mean: float = 0.0

    def moments(self, shape: Sequence[int]) -> tuple[float, float]:
        """(mean, standard deviation)."""
        del shape
        return self.mean, self.std


Rules = Sequence[tuple[str, Fan | Normal]]
"""(regular expression searched in a parameter's name, how it is drawn); the first that is found decides."""


def build_random(make: Callable[[], ModuleT], seed: int, prefix: str, rules: Rules = ()) -> ModuleT:
    """`make()` with random parameters, float32, evaluation mode, no gradients.

    Args:
        make: builds the module. Its own initialisation is skipped where it would draw numbers.
        seed: 0 or greater.
        prefix: put before names where they are hashed, so that two modules of a model differ (``"model."``).
        rules: what this architecture needs beyond the defaults.
    """
    with _NoDrawing():
        module = make()
    kinds = {f"{path}.{leaf}".lstrip("."): part for path, part in module.named_modules() for leaf in _own(part)}
    parameters = dict(module.named_parameters())
    largest_first = sorted(parameters.items(), key=lambda item: -item[1].numel())

    def fill(item: tuple[str, Tensor]) -> None:
        name, tensor = item
        array = tensor.detach().numpy()
        mean, std = _drawn(name, kinds[name], array.ndim, rules).moments(array.shape)
        _generator(seed, prefix + name).standard_normal(out=array, dtype=np.float32)
        array *= np.float32(std)
        array += np.float32(mean)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        for _ in pool.map(fill, largest_first):
            pass
    return module.eval().requires_grad_(False)


def _generator(seed: int, name: str) -> np.random.Generator:
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def _own(module: nn.Module) -> Iterable[str]:
    return (name for name, _ in module.named_parameters(recurse=False))


def _drawn(name: str, module: nn.Module, ndim: int, rules: Rules) -> Fan | Normal:
    for pattern, drawn in rules:
        if re.search(pattern, name):
            return drawn
    if isinstance(module, nn.Embedding):
        return Normal()
    if "Norm" in type(module).__name__ and name.endswith("weight"):
        return Normal(DEFAULT_STD, 1.0)
    return Fan() if ndim >= 2 and name.endswith("weight") else Normal()


class _NoDrawing(TorchFunctionMode):
    """Skips the in-place draws of torch's constructors, which cost more than ours and are overwritten anyway."""

    _DRAWS = frozenset(
        (Tensor.normal_, Tensor.uniform_, nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run everything but draws."""
        if func in self._DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
