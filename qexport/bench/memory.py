"""What this process holds and ever held, and what the device lost; in bytes, None where the system does not tell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Resident:
    """Resident memory by kind: `anonymous` is this process's own; `file` are pages of mapped files.

    The kernel can drop pages of files when memory is short, and processes that map the same file share them.
    """

    anonymous: int
    file: int

    def above(self, other: Resident) -> Resident:
        """What has been added since `other`."""
        return Resident(self.anonymous - other.anonymous, self.file - other.file)


def resident_bytes() -> int | None:
    """Resident memory now."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most resident memory so far."""
    return _status("VmHWM")


def resident_by_kind() -> Resident | None:
    """Resident memory now, the process's own apart from that of mapped files."""
    anonymous, file = _status("RssAnon"), _status("RssFile")
    return None if anonymous is None or file is None else Resident(anonymous, file)


def _status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith(f"{key}:")]
    return int(found[0].split()[1]) * 1024 if found else None
