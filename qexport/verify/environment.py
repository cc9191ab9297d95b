"""On what a measurement was made: versions, processor, threads, device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import onnxruntime
import torch

from qexport.targets.devices import cpu_name

PACKAGES = ("qexport", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript", "numpy")


def describe_environment(provider: str) -> dict[str, Any]:
    """Plain data for reports; versions of packages that are not installed are left out."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "onnxruntime_threads": "one per physical core (default)",
        "onnxruntime_build": onnxruntime.get_device(),
        "provider": provider,
    }
