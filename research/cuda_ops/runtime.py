"""ONNX Runtime sessions with the operators registered, and runs on fixed device buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Runtime:
    """ONNX Runtime with the operators registered, on one execution provider."""

    def __init__(self, library: Path, provider: str) -> None:
        import onnxruntime as ort

        with contextlib.suppress(Exception):
            ort.preload_dlls()  # a no-op where torch has loaded them
        self.ort, self.operators, self.provider = ort, str(library), provider

    def session(self, model: bytes, graph: bool = False, strict: bool = False) -> Any:
        """Make a session; `strict` refuses nodes that fall back to the CPU, `graph` captures CUDA graphs."""
        options = self.ort.SessionOptions()
        options.register_custom_ops_library(self.operators)
        options.log_severity_level = 3
        if strict:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        cuda = self.provider.startswith("CUDA")
        chosen = [(self.provider, {"enable_cuda_graph": "1"} if graph else {})] if cuda else [self.provider]
        made = self.ort.InferenceSession(model, options, providers=chosen)
        if made.get_providers()[0] != self.provider:
            raise RuntimeError(f"{self.provider} is not available: the session got {made.get_providers()}")
        return made

    def values(self, model: bytes, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run once and return inputs and outputs by name."""
        session = self.session(model)
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, {n: t.cpu().numpy() for n, t in inputs.items()})
        device = next(iter(inputs.values())).device
        return dict(inputs) | {n: torch.from_numpy(r).to(device) for n, r in zip(names, results, strict=True)}

    def runner(self, session: Any, inputs: dict[str, torch.Tensor], graph_id: int | None) -> Callable[[], None]:
        """Return a function that enqueues one run on fixed device buffers, without waiting for it."""
        binding = session.io_binding()
        held = [self.ort.OrtValue.ortvalue_from_numpy(t.cpu().numpy(), "cuda", 0) for t in inputs.values()]
        for name, value in zip(inputs, held, strict=True):
            binding.bind_ortvalue_input(name, value)
        lead = tuple(inputs["x"].shape[:2])
        for output in session.get_outputs():
            shape = [*lead, output.shape[-1]]
            value = self.ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, "cuda", 0)
            held.append(value)
            binding.bind_ortvalue_output(output.name, value)
        options = self.ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph_id is not None:
            options.add_run_config_entry("gpu_graph_id", str(graph_id))

        def run(keep: list[Any] = held) -> None:  # `keep`: the buffers must outlive the captured graph
            session.run_with_iobinding(binding, options)

        return run
