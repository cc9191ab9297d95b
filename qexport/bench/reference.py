"""The floating-point twin of a bundle: the same graphs with nothing quantised, to be faster than.

Made from the bundle itself, so that it needs no checkpoint: weights are dequantised (code · scale, exact in float32),
the quantisers of activations taken out. The numbers differ from the model's, its work does not. The twin is lowered
with the rewrites of the provider, as its best rival would be:

    fp32    float32 weights, float32 compute
    fp16    on CUDA float16 compute; on the CPU, which computes float32 either way, weights stored in float16
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qexport.bundle import Bundle, WeightFileWriter
from qexport.bundle.files import WEIGHTS
from qexport.lower.graphs import read_graph, rewrite, write_graph
from qexport.lower.lowering import state_ports
from qexport.lower.passes.half import HalfPrecision
from qexport.lower.rewrite import Rewrite, add_node, nodes, producer, rank, remove_unused, replace
from qexport.lower.targets import TARGETS

FOLDER = "graphs"
"""Of the twin's files; paths of external data are relative to the twin's root, as in a target's folder."""

PROVIDER_TARGETS = {"cpu": "ort-cpu", "cuda": "ort-cuda", "tensorrt": "tensorrt"}
"""Whose rewrites the twin gets."""


def write_twin(bundle: Bundle, root: Path, form: str, provider: str) -> dict[str, Path]:
    """Write the twin's graphs and weights into the folder `root`; the path of each graph.

    Args:
        bundle: the bundle.
        root: an empty folder.
        form: ``"fp32"`` or ``"fp16"``.
        provider: ``"cpu"`` or ``"cuda"``: whose rewrites it gets.
    """
    target = TARGETS[PROVIDER_TARGETS[provider]]
    half = form == "fp16" and "float16" in target.dtypes
    files = {}
    with WeightFileWriter(root / WEIGHTS) as weights:
        for name, file in bundle.graph_files().items():
            model = read_graph(file)
            take_out_quantisers(model)
            fold_weights(model)
            steps: list[Rewrite] = [step() for step in target.rewrites]
            if half:
                steps.append(HalfPrecision(state_ports(bundle.manifest, name)))
            rewrite(model, steps)
            if form == "fp16" and not half:
                store_half(model)
            _internalise(model)
            relative = f"{FOLDER}/{name}.onnx"
            write_graph(model, root, relative, weights, WEIGHTS, "float16" if half else "float32")
            files[name] = root / relative
    return files


def take_out_quantisers(model: ir.Model) -> None:
    """DequantizeLinear(QuantizeLinear(x)) → x, and what only made the scales goes too."""
    graph = model.graph
    for node in list(nodes(graph, "DequantizeLinear")):
        quantize = producer(node.inputs[0], "QuantizeLinear")
        if quantize is None or quantize.inputs[0] is None:
            continue
        replace(graph, node.outputs[0], quantize.inputs[0])
        remove_unused(graph, node.outputs[0])
    common.RemoveUnusedNodesPass()(model)


def fold_weights(model: ir.Model) -> None:
    """Constants behind DequantizeLinear or Cast become float32 initialisers."""
    graph = model.graph
    for node in list(nodes(graph, "DequantizeLinear", "Cast")):
        out = node.outputs[0]
        if out.dtype != ir.DataType.FLOAT or any(value is not None and not _constant(value) for value in node.inputs):
            continue
        numbers = _value(out)
        name = f"{out.name}.float32"
        value = ir.Value(name=name, const_value=ir.tensor(numbers, name=name), type=ir.TensorType(ir.DataType.FLOAT))
        value.shape = ir.Shape(numbers.shape)
        graph.register_initializer(value)
        replace(graph, out, value)
        remove_unused(graph, out)
    common.RemoveUnusedNodesPass()(model)


def store_half(model: ir.Model) -> None:
    """Matrices are stored in float16 behind a Cast, which ONNX Runtime folds at load."""
    graph = model.graph
    for node in list(nodes(graph, "MatMul", "Conv")):
        weight = node.inputs[1]
        if weight is None or not weight.is_initializer() or (rank(weight) or 0) < 2 or weight.const_value is None:
            continue
        name = f"{weight.name}.half"
        if name in graph.initializers:
            stored = graph.initializers[name]
        else:
            numbers = weight.const_value.numpy().astype(np.float16)
            stored = ir.Value(name=name, const_value=ir.tensor(numbers, name=name))
            stored.type, stored.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape(numbers.shape)
            graph.register_initializer(stored)
        cast = add_node(graph, node, "Cast", [stored], f"{name}/Cast", {"to": ir.DataType.FLOAT})[0]
        node.replace_input_with(1, cast)
    common.RemoveUnusedNodesPass()(model)


def _constant(value: ir.Value) -> bool:
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return node.op_type in ("Cast", "DequantizeLinear") and all(v is None or _constant(v) for v in node.inputs)


def _value(value: ir.Value) -> np.ndarray:
    """The numbers of a constant behind Cast and DequantizeLinear, as float32."""
    node = value.producer()
    if node is None:
        assert value.const_value is not None
        return value.const_value.numpy().astype(np.float32)
    inputs = [None if v is None else _value(v) for v in node.inputs]
    codes = inputs[0]
    assert codes is not None
    if node.op_type == "Cast":
        return codes
    scale, zero = inputs[1], inputs[2] if len(inputs) > 2 else None
    assert scale is not None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    scale = _spread(scale, codes.shape, axis, block)
    return (codes if zero is None else codes - _spread(zero, codes.shape, axis, block)) * scale


def _spread(values: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Scales or zero points, so that they broadcast over the codes."""
    if block:
        return np.repeat(values, block, axis=axis).take(range(shape[axis]), axis=axis)
    if values.ndim != 1 or len(shape) == 1:
        return values
    return values.reshape([-1 if place == axis % len(shape) else 1 for place in range(len(shape))])


def _internalise(model: ir.Model) -> None:
    """Tensors that lie in the bundle's weight file are read, so that they go to the twin's own."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            tensor = value.const_value
            value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)
