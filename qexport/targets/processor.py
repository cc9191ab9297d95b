"""What the processor can do: kernels of ONNX Runtime's CPU provider depend on it, and how work is shared."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
EXACT = frozenset({"avx512_vnni", "avx_vnni"})
"""Linux' names of the instructions that add four products of uint8 and int8 to an int32 without a step in 16 bits."""


@cache
def sums_exactly() -> bool:
    """Whether products of uint8 and int8 are known to be summed without saturating; False where nothing tells."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not EXACT.isdisjoint(flags)


def usable_cores() -> int:
    """Cores that this process may run on, which a batch system may have made fewer; no quotas."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
