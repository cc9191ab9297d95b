"""Giving freed memory back to the system.

Making a session frees as much as it keeps: weights before and after they are transposed, blocked or packed, and the
graph before it is optimised. The C library holds on to freed blocks below its threshold for mappings of their own, and
glibc raises that threshold up to 32 MiB whenever such a mapping is freed, so that almost every matrix falls below it.
"""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> bool:
    """Return the pages of freed memory to the system; whether any were. Does nothing where the C library is not glibc.

    It visits every free block: milliseconds after a session was made, too much for every batch.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return bool(trim(0)) if trim is not None else False
