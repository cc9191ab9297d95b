"""Give parameters their bytes: quantised ones behind ``DequantizeLinear``, halved ones behind ``Cast``.

    quantised    W(int)[K, N], s(fp16) → Cast(s) → DequantizeLinear(W, s) → consumers
    stored fp16  W(fp16) → Cast → consumers
    stored fp32  W → consumers

The scale is stored fp16 and cast, not given through ``output_dtype``: runtimes fold the Cast and then fuse
``DequantizeLinear → MatMul``, while the attribute crashes ONNX Runtime 1.31 when the session is created.

A convolution's weight (O, I, kh, kw) keeps its order; its scales are per channel, along axis 0, or one for all.

Where `zeroed` asks for it, a weight with scales per channel has zero points too, all 0. ONNX Runtime's CPU provider can
turn int8 weights with int8 activations into uint8 ones (``session.x64quantprecision``); it makes up a single zero point
where there is none, and refuses to run that with scales per channel unless the layer was fused.

Needs: `LinearForm` first (a quantised matrix must be TRANSPOSED: groups run along axis 0). Leaves true: every parameter
has a value that points into the weight file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qexport.bundle import WeightRef
from qexport.graph.passes.linear import TRANSPOSED
from qexport.scheme import PerChannel, PerGroup, TensorSpec

SCALE_SUFFIX = "_scale"


class AttachWeights(ir.passes.InPlacePass):
    """Point parameters at `refs` (by initialiser name); `quantized` says which of them are codes, and how they scale.

    Raises:
        ValueError: a parameter without a place in the weight file, or a quantised one that no MatMul or Conv consumes.
    """

    def __init__(
        self,
        refs: Mapping[str, WeightRef],
        quantized: Mapping[str, TensorSpec],
        location: str,
        folder: Path,
        zeroed: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.zeroed = zeroed
        self.refs, self.quantized, self.location, self.folder = refs, quantized, location, folder
        self._position: dict[ir.Node, int] = {}  # of the nodes that were there before

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See class."""
        graph = model.graph
        waiting = [value for value in graph.initializers.values() if value.const_value is None]
        self._position = {node: number for number, node in enumerate(graph)}
        for value in waiting:
            name = value.name or ""
            if name not in self.refs:
                raise ValueError(f"graph {graph.name!r}: no bytes for parameter {name!r}")
            if name in self.quantized:
                self._dequantize(graph, value, self.quantized[name])
            elif self.refs[name].dtype == "float16":
                self._insert(graph, value, ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast"))
            self._point(value, self.refs[name])
        return ir.passes.PassResult(model, bool(waiting))

    def _dequantize(self, graph: ir.Graph, weight: ir.Value, spec: TensorSpec) -> None:
        convolution = is_convolution(weight)
        if not convolution and not weight.meta.get(TRANSPOSED):
            raise ValueError(f"{weight.name!r} is to be quantised but no MatMul or Conv takes it as its weight")
        name = f"{weight.name}{SCALE_SUFFIX}"
        scale = ir.Value(name=name)
        self._point(scale, self.refs[name])
        graph.register_initializer(scale)
        cast = ir.node("Cast", [scale], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
        cast.outputs[0].dtype = ir.DataType.FLOAT
        cast.outputs[0].name = f"{name}/Cast:0"
        attributes: dict[str, int] = {"axis": 0 if convolution else 1}
        if isinstance(spec.granularity, PerGroup):
            attributes = {"axis": 0, "block_size": spec.granularity.size}
        graph.insert_before(graph[0], cast)
        inputs = [weight, cast.outputs[0]]
        if weight.name in self.zeroed and isinstance(spec.granularity, PerChannel):
            inputs.append(_zero_points(graph, str(weight.name), self.refs[name].shape[0], spec))
        dequantize = ir.node("DequantizeLinear", inputs, attributes, name=f"{weight.name}/DequantizeLinear")
        self._insert(graph, weight, dequantize)

    def _insert(self, graph: ir.Graph, weight: ir.Value, node: ir.Node) -> None:
        """Put `node`, which reads `weight`, between it and everything else that does."""
        first = min((use.node for use in weight.uses() if use.node is not node), key=self._position.__getitem__)
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"{node.name}:0", ir.DataType.FLOAT, weight.shape
        for use in list(weight.uses()):
            if use.node is not node:
                use.node.replace_input_with(use.idx, out)
        graph.insert_before(first, node)

    def _point(self, value: ir.Value, ref: WeightRef) -> None:
        dtype = ir.DataType[ONNX_NAMES[ref.dtype]]
        value.const_value = ir.ExternalTensor(
            self.location,
            ref.offset,
            ref.nbytes,
            dtype,
            name=value.name or "",
            shape=ir.Shape(ref.shape),
            base_dir=self.folder,
        )
        value.dtype, value.shape = dtype, ir.Shape(ref.shape)


def _zero_points(graph: ir.Graph, weight: str, count: int, spec: TensorSpec) -> ir.Value:
    """Zeros (count,) in the type of the codes. Each weight has its own: ONNX Runtime fails to rewrite shared ones."""
    dtype = ir.DataType[str(spec.format.onnx_type)]
    name = f"{weight}_zero_point"
    value = ir.Value(name=name, const_value=ir.tensor(np.zeros(count, np.int8), dtype=dtype, name=name))
    value.type, value.shape = ir.TensorType(dtype), ir.Shape([count])
    graph.register_initializer(value)
    return value


def is_convolution(weight: ir.Value) -> bool:
    """Whether a parameter is the weight of convolutions and nothing else."""
    uses = [(use.node.op_type, use.idx) for use in weight.uses()]
    return bool(uses) and all(use == ("Conv", 1) for use in uses)


ONNX_NAMES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "int4": "INT4",
    "int2": "INT2",
    "float8e4m3fn": "FLOAT8E4M3FN",
    "float8e5m2": "FLOAT8E5M2",
}
