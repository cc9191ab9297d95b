"""The graphs of a model: ports, the torch module that computes the same, and how to capture it piecewise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qexport.plan import Dim

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Port:
    """One input or output of a graph: name, dtype as NumPy spells it, shape with symbolic dimensions by name."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Part:
    """A stretch of a graph that is captured on its own.

    `modules` differ in nothing but their weights: the first is captured, and the copies follow one another. Ports are
    wires: an input takes the latest value of that name (an output of an earlier part or copy, else an input of the
    graph). ``{i}`` in a port's name and in `prefix`, which is put before parameter names, stands for the copy's number.
    """

    modules: tuple[torch.nn.Module, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    prefix: str = ""


@dataclass(frozen=True)
class GraphSpec:
    """A graph to be captured, and the torch module that computes the same.

    `module.forward` takes one tensor per entry of `inputs`, in order, and returns a tuple with one per entry of
    `outputs`. `parts` says how to capture it piecewise (a transformer: before, one block, after); without them it is
    traced as a whole. `example_dims` gives each symbolic dimension a size ≥ 2 for tracing (smaller ones would be baked
    in). No parameter may belong to two graphs.
    """

    name: str
    module: torch.nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example_dims: Mapping[str, int]
    parts: tuple[Part, ...] = ()

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """`parts`, or the whole as one."""
        return self.parts or (Part((self.module,), self.inputs, self.outputs),)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer under the name that its initialiser has, in order of use."""
        found: dict[str, torch.Tensor] = {}
        for part in self.all_parts:
            for i, module in enumerate(part.modules):
                prefix = part.prefix.format(i=i)
                found |= {prefix + name: value for name, value in module.named_parameters()}
                found |= {prefix + name: value for name, value in module.named_buffers()}
        return found
