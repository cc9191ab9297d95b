"""What the devices of this machine are called."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

from qexport.targets.ort_cuda import device_count

LONGEST_NAME = 256


def device_names(provider: str) -> list[str]:
    """Names of what a provider would run on here: the processor, or every GPU; empty where there is none."""
    if provider == "cpu":
        return [cpu_name()]
    count = device_count()
    if not count:
        return []
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    names = []
    for number in range(count):
        device, buffer = ctypes.c_int(0), ctypes.create_string_buffer(LONGEST_NAME)
        if driver.cuDeviceGet(ctypes.byref(device), number) == 0:
            driver.cuDeviceGetName(buffer, LONGEST_NAME, device)
            names.append(buffer.value.decode())
    return names


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
