"""Ctrl-C and `kill` end a command in an orderly way: what is half-written is removed on the way out.

A handler raises, and Python throws away what is raised inside of a weakref callback, a `__del__` or a callback of C
code. So the first signal also starts a timer, whose handler raises again unless what was raised is on its way: then it
is among the exceptions that are being handled, as it is in every `finally` and `except` that it passes. `heard` ends
that, once the command line has it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

IMPATIENCE_S = 2.0
"""A second Ctrl-C this soon after the first is ignored: it would interrupt the clean-up that the first one started."""

LOST_AFTER_S = 0.1
"""How often the timer looks whether a stop was lost."""


class _Stopper:
    """The handler of both signals. `arm(seconds)` starts a timer that calls `again`, and `arm(0)` stops it."""

    def __init__(self, arm: Callable[[float], object] = lambda seconds: None) -> None:
        self._last_s = -IMPATIENCE_S
        self._arm = arm
        self._raised: BaseException | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s < IMPATIENCE_S:
            return
        self._last_s = now_s
        self._raised = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        self._arm(LOST_AFTER_S)
        raise self._raised

    def again(self, number: int, frame: FrameType | None) -> None:
        """Raise once more what was raised and lost; the timer goes on until it is heard."""
        if self._raised is None:
            return
        self._arm(LOST_AFTER_S)
        if not self.has_raised(sys.exception()):
            raise self._raised

    def has_raised(self, error: BaseException | None) -> bool:
        """Whether `error` is what a signal raised, or came up while that was being handled."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            if error is self._raised:
                return True
            seen.add(id(error))
            error = error.__context__
        return False

    def heard(self) -> None:
        """Stop the timer: what was raised has arrived, or the command is through anyway."""
        self._raised = None
        self._arm(0)


def stop_cleanly() -> None:
    """Install the handlers, unless the parent process decided otherwise (a shell does for background jobs)."""
    timed = hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    stopper = _Stopper(partial(signal.setitimer, signal.ITIMER_REAL)) if timed else _Stopper()
    if timed:
        signal.signal(signal.SIGALRM, stopper.again)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stopper)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stopper)
    sys.unraisablehook = partial(_silent, stopper, sys.unraisablehook)


def heard() -> None:
    """Tell the installed handlers, if there are any, that the command has ended; see the module."""
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if isinstance(handler, _Stopper):
            handler.heard()


def _silent(
    stopper: _Stopper, report: Callable[[sys.UnraisableHookArgs], object], lost: sys.UnraisableHookArgs
) -> None:
    """Leave out of stderr what the timer will raise again."""
    if not stopper.has_raised(lost.exc_value):
        report(lost)
