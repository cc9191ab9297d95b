"""What this process holds and ever held, and what the device lost; in bytes, None where the system does not tell."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Resident memory now."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most resident memory so far."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{key}:")]
    return int(found[0].split()[1]) * 1024 if found else None
