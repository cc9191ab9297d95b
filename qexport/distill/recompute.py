"""How the student computes while it is trained: in which precision, and what of it is kept for the backward pass.

Activations of some modules can be computed again in the backward pass instead of kept (Chen et al., arXiv:1604.06174).
The second computation must see the same overlay of rounded weights as the first, and the mode that lays it over is not
active in the backward pass: so it is entered again around each module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qexport.distill.settings import DistillSettings
from qexport.distill.student import Student, trained_graph
from qexport.errors import InputError


@contextmanager
def computing(student: nn.Module, settings: DistillSettings, kept_whole: int = 0) -> Iterator[None]:
    """While entered, forward passes are those of training; the first `kept_whole` blocks keep their activations.

    With one block kept whole, what a forward pass keeps is the most that a backward pass with `recompute` ever holds:
    the inputs of all blocks, and the activations of the one that is being computed again.

    Raises:
        InputError: on leaving, if blocks should be computed again and the model never called one.
    """
    if not (settings.recompute and isinstance(student, Student)):
        with precision(student, settings):
            yield
        return
    blocks = blocks_of(student)[kept_whole:]
    with precision(student, settings), recomputed(blocks, student.again) as reached:
        yield
    if blocks and not reached:
        raise InputError(
            f"recompute: {student.generator.entry.name} does not call its blocks as modules when it is taught, so they "
            "cannot be computed again; leave recompute out"
        )


def precision(student: nn.Module, settings: DistillSettings) -> torch.autocast:
    """Matrix products in bfloat16, where the settings say so."""
    return torch.autocast(next(student.parameters()).device.type, torch.bfloat16, enabled=settings.bf16)


def blocks_of(student: Student) -> list[nn.Module]:
    """The modules of the trained graph that repeat: what is worth computing twice."""
    graph = student.generator.graph(trained_graph(student.generator))
    return [module for part in graph.all_parts if len(part.modules) > 1 for module in part.modules]


@contextmanager
def recomputed(
    modules: Iterable[nn.Module], again: Callable[[], AbstractContextManager[Any]]
) -> Iterator[list[nn.Module]]:
    """While entered, calls of `modules` keep nothing but their inputs; afterwards the modules are as they were.

    Yields the modules that have been called.
    """
    changed = list(modules)
    reached: list[nn.Module] = []

    def contexts(module: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        reached.append(module)
        return nullcontext(), again()

    for module in changed:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=partial(contexts, module))
    try:
        yield reached
    finally:
        for module in changed:
            del module.__dict__["forward"]
