"""Sessions whose runs are CUDA graphs, and the backend with fixed addresses that they need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnxruntime import InferenceSession

from qexport.errors import BundleError
from qexport.plan import Plan
from qexport.runtime.session import make_session
from qexport.runtime.static_backend import StaticBackend, check_plan
from qexport.targets import SessionConfig
from qexport.targets.ort_cuda import captured


def captured_sessions(
    files: Mapping[str, Path], root: Path, configs: Mapping[str, SessionConfig], threads: int | None = None
) -> tuple[dict[str, InferenceSession], tuple[str, ...]]:
    """A session for each graph, as CUDA graphs where ONNX Runtime allows it, and the names of those where it does not.

    It refuses a graph with copies between host and device inside, such as portable graphs may have.

    Raises:
        BundleError: ONNX Runtime cannot load a graph either way.
    """
    sessions, refused = {}, []
    for name, file in files.items():
        try:
            sessions[name] = make_session(file, root, captured(configs[name]), threads)
        except BundleError:
            refused.append(name)
            sessions[name] = make_session(file, root, configs[name], threads)
    return sessions, tuple(refused)


def static_backend(plan: Plan, sessions: Mapping[str, InferenceSession], device: str) -> StaticBackend:
    """The backend for them; see `check_plan` for what it raises."""
    check_plan(plan)
    return StaticBackend(sessions, device, captured=True)
