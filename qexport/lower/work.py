"""How much work a plan makes: every call's shapes followed through the graphs, without running anything.

The player plays the plan on a backend whose values are shapes. Each graph's portable file is read without its weights;
ONNX's own shape inference, with the shapes of the call put in, gives every size. From that follow

    products    for each constant matrix W [K, N]: how many rows M it is multiplied by, in how many calls
    flops       2·M·K·N of every product, 2·(sizes) of attention and convolutions; elementwise work is left out
    port_bytes  what goes in and out of the graph: state, inputs, results

Legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, shape_inference

from qexport.bundle import Bundle
from qexport.errors import BundleError
from qexport.plan import dim_size
from qexport.runtime import Player
from qexport.runtime.clock import play_once
from qexport.runtime.inputs import label_input
from qexport.runtime.ort_backend import PortType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shaped:
    """A tensor without its numbers."""

    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass
class GraphWork:
    """The work of all calls of one graph in one batch.

    `rows` maps each constant matrix (the name of its initialiser) to how often it is multiplied by so many rows;
    `sizes` has its (K, N).
    """

    calls: int = 0
    flops: float = 0.0
    port_bytes: int = 0
    rows: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


def plan_work(
    bundle: Bundle, batch: int, schedule: str | None = None, calls: int | None = None
) -> dict[str, GraphWork]:
    """The work of one batch of `batch` images, or of its first `calls` calls of graphs, by graph.

    Raises:
        BundleError: shapes cannot be followed through a graph.
        InputError: the plan has no such schedule.
    """
    backend = _ShapeBackend(bundle.graph_files())
    plan = bundle.plan if schedule is None else bundle.plan.with_schedule(schedule)
    port = label_input(plan)
    inputs = {port.name: np.zeros(batch, np.int64)} if port else {}
    play_once(Player(plan, backend, bundle.tables()), inputs, batch, calls)  # stops where a bench of `calls` does
    return backend.work


class _ShapeBackend:
    """Runs nothing; keeps account of what would have been run (`qexport.runtime.Backend`)."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._models = {name: onnx.load(str(file), load_external_data=False) for name, file in files.items()}
        self._known: dict[tuple[str, tuple[Shape, ...]], tuple[dict[str, Shaped], GraphWork]] = {}
        self.work = {name: GraphWork() for name in files}

    def inputs(self, graph: str) -> Mapping[str, PortType]:
        return {value.name: _port(value) for value in self._models[graph].graph.input}

    def outputs(self, graph: str) -> tuple[str, ...]:
        return tuple(value.name for value in self._models[graph].graph.output)

    def put(self, array: np.ndarray) -> Shaped:
        return Shaped(array.shape, str(array.dtype))

    def get(self, value: Shaped) -> np.ndarray:
        return np.zeros(value.shape, value.dtype)

    def zeros(self, shape: Shape, dtype: str) -> Shaped:
        return Shaped(shape, dtype)

    def run(self, graph: str, feeds: Mapping[str, Shaped], outputs: tuple[str, ...]) -> dict[str, Shaped]:
        key = (graph, tuple(feeds[name].shape for name in sorted(feeds)))
        if key not in self._known:
            self._known[key] = self._infer(graph, feeds)
        results, once = self._known[key]
        total = self.work[graph]
        total.calls += 1
        total.flops += once.flops
        total.port_bytes += sum(value.nbytes for value in feeds.values())
        total.port_bytes += sum(results[name].nbytes for name in outputs)
        total.sizes |= once.sizes
        for name, rows in once.rows.items():
            total.rows[name] += rows
        return {name: results[name] for name in outputs}

    def _infer(self, graph: str, feeds: Mapping[str, Shaped]) -> tuple[dict[str, Shaped], GraphWork]:
        model = onnx.ModelProto()
        model.CopyFrom(self._models[graph])
        dims: dict[str, int] = {}
        for value in model.graph.input:
            given = feeds[value.name].shape
            for dim, size in zip(value.type.tensor_type.shape.dim, given, strict=True):
                if dim.dim_param and "*" not in dim.dim_param:
                    dims[dim.dim_param] = size
                dim.dim_value = size
        declared = {value.name: _port(value) for value in model.graph.output}
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        shapes = _shapes(shape_inference.infer_shapes(model, data_prop=True))
        results = {}
        for name, port in declared.items():
            shape = shapes.get(name)
            if shape is None:
                try:
                    shape = tuple(dim_size(size, dims) for size in port.shape)
                except KeyError as error:
                    raise BundleError(f"graph {graph!r}: the shape of {name!r} cannot be told ({error})") from None
            results[name] = Shaped(shape, port.dtype)
        return results, _work_of(model, shapes)


def _port(value: onnx.ValueInfoProto) -> PortType:
    tensor = value.type.tensor_type
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    return PortType(dtype, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Every shape that is known to the last size; initialisers included."""
    found: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _work_of(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> GraphWork:
    work = GraphWork()
    makers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        known = [shapes.get(name) for name in node.input]
        work.flops += _flops(node, known, shapes)
        if node.op_type != "MatMul" or known[0] is None or known[1] is None or len(known[1]) != 2:
            continue
        weight = _stored(node.input[1], makers, constants)
        if weight is not None:
            work.rows[weight][math.prod(known[0][:-1])] += 1
            work.sizes[weight] = (known[1][0], known[1][1])
    return work


def _stored(name: str, makers: Mapping[str, NodeProto], constants: set[str]) -> str | None:
    """The initialiser behind a weight, through the nodes that dequantise or cast it."""
    while name not in constants:
        node = makers.get(name)
        if node is None or node.op_type not in ("DequantizeLinear", "Cast"):
            return None
        name = node.input[0]
    return name


def _flops(node: NodeProto, inputs: list[Shape | None], shapes: Mapping[str, Shape]) -> float:
    out = shapes.get(node.output[0])
    if out is None or not inputs or inputs[0] is None:
        return 0.0
    if node.op_type == "MatMul":
        return 2.0 * math.prod(out) * inputs[0][-1]
    if node.op_type == "Conv" and inputs[1] is not None:
        return 2.0 * math.prod(out) * math.prod(inputs[1][1:])
    if node.op_type == "Attention" and inputs[1] is not None and len(inputs[0]) == len(inputs[1]) == 4:
        return 4.0 * math.prod(inputs[0]) * inputs[1][2]  # scores and mixing, each 2·queries·keys·width a head
    return 0.0
