"""Capture a torch module as an ONNX graph without weights.

The exporter sees the floating-point module and nothing else. Its graph is cleaned by onnxscript's optimizer with every
parameter's value withheld: constants fold, weights keep their names and are never transposed, copied or merged. What
comes back knows each parameter by name only; `passes.attach` gives it bytes.

Tracing costs seconds per transformer block, most of it in symbolic shapes, so each part of a graph is traced once and
`qexport.graph.compose` lays out the copies. A process that captures the same architecture again, with other weights or
for another scheme, does not trace it again (`qexport.graph.signature`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer

from qexport.family import GraphSpec, Part, Port
from qexport.graph.compose import compose
from qexport.graph.signature import signature
from qexport.plan import dim_size

CAPTURE_OPSET = 23
"""The first with `Attention`; SDPA decomposes below it and nothing fuses it again."""

# Constants up to these sizes are folded: shape arithmetic and small vectors, never anything worth storing once.
FOLD_INPUT_ELEMENTS = 4096
FOLD_OUTPUT_ELEMENTS = 65536


KEPT_TRACES = 32
"""Parts whose traces a process keeps, the latest used."""

_traces: OrderedDict[Hashable, ir.Model] = OrderedDict()


def capture(spec: GraphSpec) -> ir.Model:
    """The graph of `spec`: ports named and shaped as declared, parameters as initialisers without value.

    No weight is copied: tracing works on fake tensors, and the captured values are dropped.
    """
    with _quiet():
        traced = [_traced(part, spec.example_dims) for part in spec.all_parts]
    return compose(spec, traced)


def parameter_names(model: ir.Model) -> list[str]:
    """Names of the initialisers that still want bytes, in graph order."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def _traced(part: Part, sizes: Mapping[str, int]) -> ir.Model:
    """What `_trace` gives, made once for equal modules; not to be changed."""
    same = signature(part.modules[0])
    if same is None:
        return _trace(part, sizes)
    key = same, part.inputs, tuple(sorted(sizes.items()))
    model = _traces.pop(key, None) or _trace(part, sizes)
    _traces[key] = model
    if len(_traces) > KEPT_TRACES:
        _traces.popitem(last=False)
    return model


def _trace(part: Part, sizes: Mapping[str, int]) -> ir.Model:
    """The graph of the first module of `part`; its ports keep the exporter's names."""
    module = part.modules[0]
    arguments = tuple(
        torch.zeros([dim_size(dim, sizes) for dim in port.shape], dtype=getattr(torch, port.dtype))
        for port in part.inputs
    )
    with torch.no_grad():
        program = torch.export.export(
            module, arguments, dynamic_shapes=_dynamic_shapes(module, part.inputs), strict=False
        )
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=CAPTURE_OPSET, optimize=False, verbose=False, external_data=False
        )
    if exported is None:
        raise RuntimeError(f"torch.onnx.export returned nothing for {type(module).__name__}")
    model = exported.model
    parameters = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for name, value in model.graph.initializers.items():
        if name in parameters:
            value.const_value = None
    optimizer.optimize(model, input_size_limit=FOLD_INPUT_ELEMENTS, output_size_limit=FOLD_OUTPUT_ELEMENTS)
    return model


def _dynamic_shapes(module: torch.nn.Module, ports: tuple[Port, ...]) -> tuple[Any, ...]:
    """One entry per argument of `forward`; the ports of a ``*args`` parameter share one tuple."""
    marks = [
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(port.shape) if isinstance(dim, str)}
        for port in ports
    ]
    arguments = list(inspect.signature(module.forward).parameters.values())
    variadic = [i for i, argument in enumerate(arguments) if argument.kind is inspect.Parameter.VAR_POSITIONAL]
    if not variadic:
        return tuple(marks)
    return (*marks[: variadic[0]], tuple(marks[variadic[0] :]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own warnings and log lines are about its internals; errors still raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)
