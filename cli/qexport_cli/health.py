"""What `qexport doctor` looks at: versions, hardware, and small trials of what the commands rely on."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qexport_cli.failures import EXPORT_PACKAGES, explain
from qexport_cli.progress import Report
from qexport_cli.render import size

PACKAGES = ("qexport", "numpy", "onnxruntime", "torch", "onnx", "onnxscript", "onnx-ir")
ORT_WHEELS = ("onnxruntime", "onnxruntime-gpu")

# A whole ONNX model, y = -x in float32 with opset 13, so that the trial of onnxruntime needs no onnx.
NEGATE_MODEL = bytes.fromhex(
    "080712001a003a340a0b0a01781201792203" + b"Neg".hex() + "1201675a100a0178120b0a090801120"
    "50a0312016e62100a0179120b0a09080112050a0312016e42040a00100d"
)


@dataclass(frozen=True)
class Check:
    """One trial: whether it worked, whether qexport is of any use without it, and what to say about it."""

    name: str
    ok: bool
    required: bool
    detail: str


def environment() -> dict[str, Any]:
    """Versions and hardware as plain data."""
    from qexport.targets.processor import usable_cores

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "providers": _providers(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable": usable_cores()},
        "memory_bytes": _memory_bytes(),
        "cuda_devices": _cuda_devices(),
    }


def run_checks(progress: Report) -> list[Check]:
    """Every trial in turn; none of them raises."""
    trials: tuple[tuple[str, bool, Callable[[], str]], ...] = (
        ("onnxruntime on the CPU", True, lambda: _negate("CPUExecutionProvider")),
        ("onnxruntime on CUDA", False, _try_cuda),
        ("the export toolchain", False, _try_export),
        ("models", False, _try_models),
        ("this folder can be written", False, _try_write),
    )
    checks: list[Check] = []
    for done, (name, required, trial) in enumerate(trials):
        progress("check", done, len(trials))
        try:
            checks.append(Check(name, True, required, trial()))
        except Exception as error:  # whatever is broken here is what the user wants to read about
            checks.append(Check(name, False, required, _reason(error)))
    progress("check", len(trials), len(trials))
    return checks


class _UnusableError(Exception):
    """A trial that did not work, and why; nothing is broken in qexport."""


def _reason(error: Exception) -> str:
    if isinstance(error, _UnusableError):
        return str(error)
    return explain(error)[0].removeprefix("error: ").removeprefix("defect of qexport, please report it: ")


def _negate(provider: str) -> str:
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(NEGATE_MODEL, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise _UnusableError(f"onnxruntime could not start {provider}")
    answer = np.asarray(session.run(None, {"x": np.array([1, -2], np.float32)})[0])
    if answer.tolist() != [-1, 2]:
        raise _UnusableError(f"a trial graph computed {answer.tolist()} instead of [-1, 2]")
    return "ran a trial graph"


def _try_cuda() -> str:
    import onnxruntime

    from qexport.targets.ort_cuda import device_count

    if not device_count():
        raise _UnusableError("no CUDA device; bundles run on the CPU")
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    return _negate("CUDAExecutionProvider")


def _try_export() -> str:
    for name in sorted(EXPORT_PACKAGES):
        importlib.import_module(name)
    return "quantize and verify have what they need"


def _try_models() -> str:
    from qexport_models.checkpoints import checkpoint_folder

    from qexport.family import families

    entries = [entry for family in families() for entry in family.entries]
    here = [e for e in entries if e.bundled or all((checkpoint_folder() / file).is_file() for file in e.files)]
    return f"{len(here)} of {len(entries)} have their weights here; see `qexport models`"


def _try_write() -> str:
    with tempfile.NamedTemporaryFile(dir=".", prefix=".qexport-doctor-"):
        pass
    return f"{size(shutil.disk_usage('.').free)} free in {Path.cwd()}"


def _version(package: str) -> str | None:
    for name in ORT_WHEELS if package == "onnxruntime" else (package,):
        try:
            return version(name) + ("" if name == package else f" ({name})")
        except PackageNotFoundError:
            continue
    return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]


def _cuda_devices() -> int:
    from qexport.targets.ort_cuda import device_count

    return device_count()


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> dict[str, int | None]:
    if sys.platform == "linux":
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kibibytes = {words[0]: int(words[1]) for words in lines}
        return {"total": kibibytes["MemTotal:"] * 1024, "available": kibibytes["MemAvailable:"] * 1024}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return {"total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "available": None}
    return {"total": None, "available": None}
