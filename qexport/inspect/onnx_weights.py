"""The constant tensors of a graph, and which of them are quantised matrices.

Two forms are recognised: ``DequantizeLinear`` on a constant, standard ONNX; and ``com.microsoft.MatMulNBits``, which
ONNX Runtime's own tools write.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from qexport.bundle.weights import BITS
from qexport.inspect.layers import LayerRow
from qexport.targets import FUSED_FORMS, Fusion, WeightUse, fused_forms

_SPELLING = {"float": "float32", "double": "float64"}


class _Wires:
    """Who makes and who reads each value of a graph, and the element types of its initialisers."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self.makers: dict[str, onnx.NodeProto] = {}
        self.dtypes = {tensor.name: _dtype(tensor.data_type) for tensor in graph.initializer}
        for node in graph.node:
            for i, name in enumerate(node.input):
                self.readers[name].append((node, i))
            self.makers.update(dict.fromkeys(node.output, node))


@dataclass(frozen=True)
class Stored:
    """A constant tensor: an initialiser or the value of a Constant node.

    `location` is the external file that it lies in up to byte `end`, None if it is inside the .onnx file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    location: str | None = None
    end: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


_NOTHING = Stored("", "", (), 0)


def stored_tensors(graph: onnx.GraphProto) -> dict[str, Stored]:
    """Every constant tensor of the main graph, by name."""
    found = {tensor.name: _stored(tensor.name, tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = _stored(node.output[0], attribute.t)
    return found


def quantized_layers(graph: onnx.GraphProto, tensors: Mapping[str, Stored]) -> tuple[list[LayerRow], set[str]]:
    """The quantised matrices in the order of the graph, and the names of their scales and zero points."""
    wires = _Wires(graph)
    rows: list[LayerRow] = []
    overhead: set[str] = set()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(tensors.get(node.input[0], _NOTHING).shape) > 1:
            weight = tensors[node.input[0]]
            extra = _constants(node.input[1:], tensors, wires)
            group = _integer(node, "block_size", 0) or None
            granularity, along_input = _granularity(node, weight, extra, group)
            shape = weight.shape
            fused = fused_forms(_use(node, weight, group, along_input, wires))
        elif node.op_type == "MatMulNBits" and node.input[1] in tensors:
            weight = tensors[node.input[1]]
            extra = _constants(node.input[2:5], tensors, wires)
            group = _integer(node, "block_size", 0)
            granularity, shape = f"per group of {group}", (_integer(node, "K", 0), _integer(node, "N", 0))
            fused = {provider: Fusion("MatMulNBits", "in the file already") for provider in FUSED_FORMS}
        else:
            continue
        overhead |= {tensor.name for tensor in extra}
        size = weight.size_bytes + sum(tensor.size_bytes for tensor in extra)
        count = math.prod(shape)
        rows.append(
            LayerRow(
                name=weight.name,
                graph=graph.name,
                shape=shape,
                format=weight.dtype if node.op_type == "DequantizeLinear" else f"uint{_integer(node, 'bits', 4)}",
                granularity=granularity,
                group_size=group,
                bits_per_weight=size * 8 / count if count else None,
                size_bytes=size,
                quantized=True,
                fused=fused,
            )
        )
    return rows, overhead - {row.name for row in rows}


def _stored(name: str, tensor: TensorProto) -> Stored:
    dtype = _dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    size = -(-math.prod(shape) * BITS.get(dtype, 8) // 8) if dtype != "string" else sum(map(len, tensor.string_data))
    if tensor.data_location != TensorProto.EXTERNAL:
        return Stored(name, dtype, shape, size)
    place = {entry.key: entry.value for entry in tensor.external_data}
    return Stored(name, dtype, shape, size, place.get("location", ""), int(place.get("offset", 0)) + size)


def _dtype(number: int) -> str:
    name = TensorProto.DataType.Name(number).lower()
    return _SPELLING.get(name, name)


def _constants(names: Iterable[str], tensors: Mapping[str, Stored], wires: _Wires) -> list[Stored]:
    """The constants behind inputs, looking through a Cast: scales are stored in fp16 and cast."""
    found = []
    for name in names:
        maker = wires.makers.get(name)
        source = maker.input[0] if maker is not None and maker.op_type == "Cast" else name
        if source in tensors:
            found.append(tensors[source])
    return found


def _granularity(node: onnx.NodeProto, weight: Stored, extra: list[Stored], group: int | None) -> tuple[str, bool]:
    """How scales are shared, and whether they lie as fusion wants them for a weight [K, N]."""
    rank = len(weight.shape)
    axis = _integer(node, "axis", 1) % rank if rank else 0
    if group is not None:
        return f"per group of {group}", axis == rank - 2
    if extra and extra[0].elements > 1:
        return "per channel", axis == rank - 1
    return "per tensor", True


def _use(node: onnx.NodeProto, weight: Stored, group: int | None, along_input: bool, wires: _Wires) -> WeightUse:
    """How the dequantised weight is used, looking through a Transpose."""
    uses = wires.readers[node.output[0]]
    transposed = False
    if len(uses) == 1 and uses[0][0].op_type == "Transpose":
        # ONNX Runtime folds a Transpose into a constant of whole bytes that has a scale per channel (CPU, measured).
        transposed = group is not None or weight.dtype not in ("int8", "uint8")
        along_input = True
        uses = wires.readers[uses[0][0].output[0]]
    if not uses:
        return WeightUse(weight.dtype, group, "nothing", 0)
    reader, port = uses[0]
    operator, activation = reader.op_type, None
    if operator in ("MatMul", "Gemm"):
        transposed = transposed or (operator == "Gemm" and bool(_integer(reader, "transB", 0)))
        activation = _activation_format(reader.input[0], wires)
        operator = operator if port == 1 else f"{operator} on its first input"
    return WeightUse(weight.dtype, group, operator, len(uses), along_input, transposed, activation)


def _activation_format(name: str, wires: _Wires) -> str | None:
    """The format in which a value was quantised and dequantised, or None if it was not."""
    dequantize = wires.makers.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantize = wires.makers.get(dequantize.input[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    zero_point = wires.dtypes.get(quantize.input[2]) if len(quantize.input) > 2 else None
    return zero_point or _dtype(_integer(quantize, "output_dtype", TensorProto.UINT8))


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
