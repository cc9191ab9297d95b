"""What the processor can do that decides about kernels of ONNX Runtime's CPU provider."""

from __future__ import annotations

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
