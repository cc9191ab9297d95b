"""What flows between the blocks of a model: the output of every module that repeats, call by call."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qexport.errors import UnsupportedError
from qexport.scaling.analysis.subject import Subject


class Streams:
    """While it is entered, keeps the first result of every block of the subject's graph: the residual stream."""

    def __init__(self, subject: Subject) -> None:
        """Find the blocks.

        Raises:
            UnsupportedError: nothing in the graph repeats.
        """
        parts = subject.generator.graph(subject.graph).all_parts
        self.blocks: list[nn.Module] = [module for part in parts if len(part.modules) > 1 for module in part.modules]
        if not self.blocks:
            raise UnsupportedError(f"{subject.generator.entry.name}: no part of {subject.graph!r} repeats")
        self._kept: list[Tensor] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Streams:
        self._handles = [block.register_forward_hook(self._keep) for block in self.blocks]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def taken(self) -> list[Tensor]:
        """What the blocks gave since the last time, in their order; each (rows, tokens, width)."""
        kept, self._kept = self._kept, []
        assert len(kept) == len(self.blocks), f"{len(kept)} results of {len(self.blocks)} blocks"
        return kept

    def _keep(self, module: nn.Module, given: Any, result: Any) -> None:
        self._kept.append((result[0] if isinstance(result, tuple) else result).detach())
