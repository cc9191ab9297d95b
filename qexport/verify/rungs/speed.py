"""Latency under ``serve``, and peak memory."""

from __future__ import annotations

from qexport.verify.rungs.climb import Climb
from qexport.verify.speed import BUDGET_S, measure_speed, peak_memory_bytes


def add_speed(climb: Climb) -> None:
    """Measure both; nothing is held against a limit."""
    climb.tell("speed", 0, 1)
    runtime = climb.runtime("serve")
    speed = climb.attempt("speed", lambda: measure_speed(runtime, climb.effort.schedule)) if runtime else None
    if speed is not None:
        climb.report.latency_ms = speed.to_json()
        for size in speed.left_out:
            climb.skip(f"speed of batch {size}", f"it would take more than {BUDGET_S:.0f} s")
    climb.report.peak_memory_bytes = peak_memory_bytes()
