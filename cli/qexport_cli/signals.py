"""Ctrl-C and `kill` end a command in an orderly way: what is half-written is removed on the way out."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

IMPATIENCE_S = 2.0
"""A second Ctrl-C this soon after the first is ignored: it would interrupt the clean-up that the first one started."""


class _Stopper:
    def __init__(self) -> None:
        self._last_s = -IMPATIENCE_S

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < IMPATIENCE_S:
            return
        self._last_s = now_s
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)


def stop_cleanly() -> None:
    """Install the handlers, unless the parent process decided otherwise (a shell does for background jobs)."""
    stopper = _Stopper()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stopper)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stopper)
