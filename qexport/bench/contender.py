"""What takes part: bundles with and without their lowered graphs, their floating-point twins, and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qexport.targets import SessionConfig

EAGER, COMPILED = "torch eager", "torch.compile"
FP32, FP16 = "fp32", "fp16"
REFERENCES = (FP32, FP16, "eager", "compile")
"""What `--against` takes."""

TORCH = {"eager": EAGER, "compile": COMPILED}


@dataclass(frozen=True)
class Settings:
    """What holds for all: where they run, and how much of the plan is played.

    `threads` None leaves the number to the runtimes; `calls` None plays whole images; `schedule` None is the plan's
    default.
    """

    provider: str = "cpu"
    threads: int | None = None
    schedule: str | None = None
    calls: int | None = None


@dataclass(frozen=True)
class Contender:
    """One of them. The plan and its tables are those of `bundle`, whatever else runs the graphs.

    `files` are the graphs, `root` the folder that their external data is found from, `configs` the session options of
    each; all are empty for torch, where `compiled` counts. `captured`: at fixed addresses, as CUDA graphs. `file_bytes`
    is what the graphs and their weights take on disk, None for torch.
    """

    name: str
    bundle: Path
    root: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    configs: Mapping[str, SessionConfig] = field(default_factory=dict)
    file_bytes: int | None = None
    compiled: bool = False
    captured: bool = False
    reference: bool = False
    checkpoint: str | None = None
    vae_checkpoint: str | None = None

    @property
    def optional(self) -> bool:
        """Whether the run is good without it: references, and CUDA graphs, which not every graph can be."""
        return self.reference or self.captured

    @property
    def torch(self) -> bool:
        """Whether torch plays it."""
        return not self.files
