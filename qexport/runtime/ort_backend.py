"""ONNX Runtime as the backend of a player: values are `OrtValue`s on the device, bound in and out by IO binding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession, OrtValue

from qexport.errors import BundleError, InputError
from qexport.runtime.session import first_line

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class PortType:
    """Type of an input of a graph: dtype as NumPy spells it, shape with symbolic dimensions by name."""

    dtype: str
    shape: tuple[int | str, ...]


class OrtBackend:
    """Runs graphs in sessions on one device. Safe to be shared by threads: it keeps no state between calls."""

    def __init__(self, sessions: Mapping[str, InferenceSession], device: str) -> None:
        """Take one session per graph; `device` is ``"cpu"`` or ``"cuda"``."""
        self._sessions = dict(sessions)
        self._device = device
        self._inputs = {name: _port_types(name, session) for name, session in self._sessions.items()}
        self._outputs = {name: tuple(o.name for o in s.get_outputs()) for name, s in self._sessions.items()}

    def inputs(self, graph: str) -> Mapping[str, PortType]:
        """Type of each input of a graph."""
        return self._inputs[graph]

    def outputs(self, graph: str) -> tuple[str, ...]:
        """Names of the outputs of a graph."""
        return self._outputs[graph]

    def put(self, array: np.ndarray) -> OrtValue:
        """Copy to the device; on the CPU it is the same memory, so the array must not be changed afterwards."""
        return OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), self._device, 0)

    def get(self, value: OrtValue) -> np.ndarray:
        """Copy to the host."""
        return value.numpy()

    def zeros(self, shape: tuple[int, ...], dtype: str) -> OrtValue:
        """A tensor of zeros."""
        return self.put(np.zeros(shape, dtype))

    def run(self, graph: str, feeds: Mapping[str, OrtValue], outputs: tuple[str, ...]) -> dict[str, OrtValue]:
        """Run one graph; only `outputs` are bound, and they stay on the device.

        Raises:
            InputError: the device has too little memory.
            BundleError: the graph refuses its inputs, or fails.
        """
        return self.run_in_place(graph, feeds, outputs, {})

    def run_in_place(
        self, graph: str, feeds: Mapping[str, OrtValue], outputs: tuple[str, ...], shared: Mapping[str, str]
    ) -> dict[str, OrtValue]:
        """As `run`, each output in `shared` written over the value fed to the input port that it maps to.

        ONNX Runtime checks that shape and type of the output are those of the value.
        """
        return self._run_bound(graph, feeds, outputs, shared, None)

    def _run_bound(
        self,
        graph: str,
        feeds: Mapping[str, OrtValue],
        outputs: tuple[str, ...],
        shared: Mapping[str, str],
        options: onnxruntime.RunOptions | None,
    ) -> dict[str, OrtValue]:
        session = self._sessions[graph]
        binding = session.io_binding()
        try:
            for name, value in feeds.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                if name in shared:
                    binding.bind_ortvalue_output(name, feeds[shared[name]])
                else:
                    binding.bind_output(name, self._device, 0)
            session.run_with_iobinding(binding, options)
            results = dict(zip(outputs, binding.get_outputs(), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise failure(graph, error) from error
        # The binding returns a second handle on the same memory; only the first keeps alive what it was made from.
        return results | {name: feeds[port] for name, port in shared.items() if name in results}


def failure(graph: str, error: Exception) -> InputError | BundleError:
    """What to raise where a run failed: too little memory is the caller's to mend."""
    text = first_line(error)
    if "allocate memory" in text or "out of memory" in text:
        return InputError(f"graph {graph!r}: out of memory; use a smaller batch ({text})")
    return BundleError(f"graph {graph!r} failed in onnxruntime {onnxruntime.__version__}: {text}")


def _port_types(graph: str, session: InferenceSession) -> dict[str, PortType]:
    types = {}
    for port in session.get_inputs():
        if port.type not in _DTYPES:
            raise BundleError(f"graph {graph!r}: input {port.name!r} is a {port.type}, which no player can feed")
        shape = tuple(size if isinstance(size, int) else str(size) for size in port.shape)
        types[port.name] = PortType(_DTYPES[port.type], shape)
    return types
