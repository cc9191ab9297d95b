"""ONNX Runtime with every tensor at a fixed address: outputs are allocated once, and calls can be CUDA graphs.

What comes from the host (labels, noise, rows of a schedule) is copied into one buffer for each port and shape. What a
graph returns lies in one of two buffers for each port and shape, the one that is not being read: a state goes back and
forth between them. So the addresses of a call repeat after two steps, or with the shapes of a growing cache after one
image, and each set of addresses is one binding, with one `gpu_graph_id` where CUDA graphs are on. The first call with
new shapes is an ordinary one, from which the shapes of outputs are learnt; it is not captured.

Unlike `OrtBackend`, a result is overwritten two calls later, and one backend serves one batch at a time: not for
observers that keep values, not to be shared by threads, and only for plans that `check_plan` lets pass.

The tests run it on the CPU, where the same buffers and bindings are used and nothing is captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession, OrtValue

from qexport.errors import InputError
from qexport.plan import Plan
from qexport.runtime.ort_backend import OrtBackend, failure

GRAPH_ID = "gpu_graph_id"
NOT_CAPTURED = "-1"
"""ONNX Runtime's value for a run outside of CUDA graphs."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Bound:
    """A binding whose addresses never change, its outputs in order, and the options of its runs."""

    binding: onnxruntime.IOBinding
    outputs: Mapping[str, OrtValue]
    options: onnxruntime.RunOptions


def check_plan(plan: Plan) -> None:
    """Whether a plan keeps no result for longer than this backend does.

    Raises:
        InputError: a graph's output goes to one state in one call and to another in the next, which would overwrite it.
    """
    states: dict[tuple[str, str], set[str]] = {}
    for call in plan.calls:
        for port, state in call.outputs.items():
            states.setdefault((call.graph, port), set()).add(state)
    for (graph, port), names in states.items():
        if len(names) > 1:
            raise InputError(f"graph {graph!r} returns several states at {port!r}; fixed buffers would mix them up")


class StaticBackend(OrtBackend):
    """See module. `captured`: the sessions were made with CUDA graphs on (`qexport.targets.ort_cuda.captured`)."""

    def __init__(self, sessions: Mapping[str, InferenceSession], device: str, captured: bool = False) -> None:
        """Take one session per graph."""
        super().__init__(sessions, device)
        self._captured = captured
        self._host: weakref.WeakKeyDictionary[OrtValue, np.ndarray] = weakref.WeakKeyDictionary()
        self._fed: dict[tuple[str, str, Shape], OrtValue] = {}
        self._made: dict[tuple[str, str, Shape], list[OrtValue]] = {}
        self._shapes: dict[tuple[str, tuple[Shape, ...], tuple[str, ...]], dict[str, Shape]] = {}
        self._dtypes: dict[tuple[str, str], str] = {}
        self._bound: dict[tuple[str, tuple[int, ...]], _Bound] = {}

    @property
    def bindings(self) -> int:
        """How many sets of addresses there are: on CUDA, as many captured graphs."""
        return len(self._bound)

    def put(self, array: np.ndarray) -> OrtValue:
        """As of `OrtBackend`, and remembered: what came from the host is copied into a fixed buffer at each call."""
        kept = np.asarray(array, order="C")
        value = super().put(kept)
        self._host[value] = kept
        return value

    def run_in_place(
        self, graph: str, feeds: Mapping[str, OrtValue], outputs: tuple[str, ...], shared: Mapping[str, str]
    ) -> dict[str, OrtValue]:
        """As of `OrtBackend`; results are overwritten by the call after the next."""
        fixed = {port: self._fixed(graph, port, value) for port, value in feeds.items()}
        signature = (graph, tuple(tuple(fixed[port].shape()) for port in sorted(fixed)), outputs)
        if signature not in self._shapes:
            results = self._first(graph, fixed, outputs, shared)
            self._shapes[signature] = {name: tuple(value.shape()) for name, value in results.items()}
            self._dtypes |= {(graph, name): value.numpy().dtype.name for name, value in results.items()}
            return results
        read = {value.data_ptr() for value in fixed.values()}
        made = {
            name: fixed[shared[name]] if name in shared else self._free(graph, name, shape, read)
            for name, shape in self._shapes[signature].items()
        }
        bound = self._binding(graph, fixed, made)
        try:
            self._sessions[graph].run_with_iobinding(bound.binding, bound.options)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise failure(graph, error) from error
        return dict(bound.outputs)

    def _fixed(self, graph: str, port: str, value: OrtValue) -> OrtValue:
        """The value itself, or the port's buffer with what came from the host copied into it."""
        array = self._host.get(value)
        if array is None:
            return value
        key = (graph, port, tuple(array.shape))
        if key not in self._fed:
            self._fed[key] = self._empty(tuple(array.shape), array.dtype.name)
        if array.size:
            self._fed[key].update_inplace(array)
        return self._fed[key]

    def _first(
        self, graph: str, feeds: Mapping[str, OrtValue], outputs: tuple[str, ...], shared: Mapping[str, str]
    ) -> dict[str, OrtValue]:
        """An ordinary run, whose results are allocated by ONNX Runtime."""
        options = onnxruntime.RunOptions()
        if self._captured:
            options.add_run_config_entry(GRAPH_ID, NOT_CAPTURED)
        return self._run_bound(graph, feeds, outputs, shared, options)

    def _free(self, graph: str, name: str, shape: Shape, read: set[int]) -> OrtValue:
        """One of the two buffers of an output, the one that this call does not read."""
        pool = self._made.setdefault((graph, name, shape), [])
        for buffer in pool:
            if buffer.data_ptr() not in read:
                return buffer
        pool.append(self._empty(shape, self._dtypes[graph, name]))
        return pool[-1]

    def _binding(self, graph: str, fixed: Mapping[str, OrtValue], made: Mapping[str, OrtValue]) -> _Bound:
        addresses = tuple(value.data_ptr() for value in (*fixed.values(), *made.values()))
        shapes = tuple(size for value in fixed.values() for size in value.shape())
        key = (f"{graph} {','.join(made)}", addresses + shapes)
        if key not in self._bound:
            binding = self._sessions[graph].io_binding()
            for name, value in fixed.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in made.items():
                binding.bind_ortvalue_output(name, value)
            options = onnxruntime.RunOptions()
            if self._captured:
                options.add_run_config_entry(GRAPH_ID, str(len(self._bound) + 1))
            self._bound[key] = _Bound(binding, dict(made), options)
        return self._bound[key]

    def _empty(self, shape: Shape, dtype: str) -> OrtValue:
        return OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self._device, 0)
