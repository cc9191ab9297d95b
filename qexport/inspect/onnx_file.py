"""Any .onnx file: operators, initialisers, quantised matrices, external data. Weights themselves are not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from qexport.errors import InputError
from qexport.inspect.layers import LayerRow, sums
from qexport.inspect.onnx_weights import Stored, quantized_layers, stored_tensors


@dataclass(frozen=True)
class ExternalFile:
    """A file that initialisers lie in: how far they reach, and its size, None if it is missing."""

    location: str
    needed_bytes: int
    size_bytes: int | None


@dataclass(frozen=True)
class OnnxReport:
    """What an .onnx file holds.

    `layers` are its matrices, quantised ones first as the graph uses them. `dtypes` maps an element type to (number of
    constants, elements, bytes). `totals` has the keys of a manifest's totals.
    """

    path: Path
    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    dtypes: dict[str, tuple[int, int, int]]
    layers: tuple[LayerRow, ...]
    external: tuple[ExternalFile, ...]
    totals: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"kind": "onnx", **asdict(self), "path": str(self.path)}


def read_model(path: Path) -> onnx.ModelProto:
    """The model at `path` without its external data.

    Raises:
        InputError: there is no such file, or it is not an ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path}: not an ONNX model ({str(error).splitlines()[0][:120]})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not model.ir_version or not model.HasField("graph"):
        raise InputError(f"{path}: not an ONNX model (it holds no graph)")
    return model


def inspect_onnx(path: str | Path) -> OnnxReport:
    """Read any .onnx file.

    Raises:
        InputError: there is no such file, or it is not an ONNX model.
    """
    path = Path(path)
    model = read_model(path)
    tensors = stored_tensors(model.graph)
    quantized, overhead = quantized_layers(model.graph, tensors)
    names = {layer.name for layer in quantized}
    others = [t for name, t in tensors.items() if name not in names and name not in overhead]
    dtypes: dict[str, tuple[int, int, int]] = {}
    for tensor in tensors.values():
        count, elements, nbytes = dtypes.get(tensor.dtype, (0, 0, 0))
        dtypes[tensor.dtype] = (count + 1, elements + tensor.elements, nbytes + tensor.size_bytes)
    pairs = [(layer.weights, layer.size_bytes or 0) for layer in quantized]
    everything = pairs + [(t.elements, t.size_bytes) for t in others]
    return OnnxReport(
        path=path,
        ir_version=model.ir_version,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        opsets=opsets_of(model),
        inputs={port.name: _sizes(port) for port in model.graph.input if port.name not in tensors},
        outputs={port.name: _sizes(port) for port in model.graph.output},
        operators=operators_of(model),
        dtypes=dtypes,
        layers=(*quantized, *(_plain_layer(model.graph.name, t) for t in others if len(t.shape) > 1)),
        external=tuple(_external(path.parent, tensors.values())),
        totals={"layers_quantized": len(quantized), **sums(pairs, "quantized"), **sums(everything, "all")},
    )


def opsets_of(model: onnx.ModelProto) -> dict[str, int]:
    """Version of each operator set that a model imports; the standard one is called ``ai.onnx``."""
    return {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}


def operators_of(model: onnx.ModelProto) -> dict[str, int]:
    """How often each operator occurs, subgraphs and functions included, the most frequent first."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    counts = Counter(node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for node in _all(nodes))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _all(nodes: list[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all(list(graph.node))


def _sizes(port: onnx.ValueInfoProto) -> list[int | str]:
    dims = port.type.tensor_type.shape.dim
    return [dim.dim_param or (dim.dim_value if dim.HasField("dim_value") else "?") for dim in dims]


def _plain_layer(graph: str, tensor: Stored) -> LayerRow:
    return LayerRow(
        name=tensor.name,
        graph=graph,
        shape=tensor.shape,
        format=tensor.dtype,
        granularity=None,
        group_size=None,
        bits_per_weight=tensor.size_bytes * 8 / tensor.elements if tensor.elements else None,
        size_bytes=tensor.size_bytes,
        quantized=False,
    )


def _external(folder: Path, tensors: Iterable[Stored]) -> Iterator[ExternalFile]:
    ends: dict[str, int] = {}
    for tensor in tensors:
        if tensor.location is not None:
            ends[tensor.location] = max(ends.get(tensor.location, 0), tensor.end)
    for location, end in ends.items():
        file = folder / location
        yield ExternalFile(location, end, file.stat().st_size if file.is_file() else None)
