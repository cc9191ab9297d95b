"""The rules of fusion, held against what ONNX Runtime's CPU provider really makes of the graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qexport.inspect import fused_forms
from qexport.inspect.onnx_file import inspect_onnx
from qexport.targets.fusion import WeightUse, use_of

K, N = 1024, 64
TYPES = {
    "int2": TensorProto.INT2,
    "int4": TensorProto.INT4,
    "int8": TensorProto.INT8,
    "uint4": TensorProto.UINT4,
    "uint8": TensorProto.UINT8,
}


def model(format_name, block, *, operator="MatMul", stored="KN", readers=1):
    """x [b, K] times a weight [K, N], whose scales are fp16 and cast, as qexport writes them."""
    rows, columns, axis = (K, N, 0) if stored == "KN" else (N, K, 1)
    packed = bytes(K * N * int(format_name.removeprefix("u").removeprefix("int")) // 8)
    weight = helper.make_tensor("w", TYPES[format_name], (rows, columns), packed, raw=True)
    if block:
        shape = (rows // block, columns) if axis == 0 else (rows, columns // block)
        attributes = {"axis": axis, "block_size": block}
    else:
        shape, attributes = ((N,), {"axis": 1 - axis}) if block is None else ((), {})
    nodes = [
        helper.make_node("Cast", ["s"], ["sf"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["w", "sf"], ["wf"], **attributes),
    ]
    matrix = "wf"
    if stored == "NK" and operator == "MatMul":
        nodes.append(helper.make_node("Transpose", ["wf"], ["wt"], perm=[1, 0]))
        matrix = "wt"
    options = {"transB": 1} if stored == "NK" and operator == "Gemm" else {}
    x, dtype = ("i", TensorProto.INT64) if operator == "Gather" else ("x", TensorProto.FLOAT)
    feeds = [matrix, x] if operator == "Gather" else [x, matrix]
    nodes += [helper.make_node(operator, feeds, [f"y{i}"], **options) for i in range(readers)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(readers)]
    scale = numpy_helper.from_array(np.ones(shape, np.float16), "s")
    ports = [helper.make_tensor_value_info(x, dtype, ["b"] if operator == "Gather" else ["b", K])]
    graph = helper.make_graph(nodes, "g", ports, outputs, [weight, scale])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)


def operators_after_optimisation(path, folder):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node}


CASES = [
    *((name, block, {}) for name in TYPES for block in (8, 16, 32, 256, 512, None, 0)),
    *(
        (name, block, how)
        for name in ("int8", "int4")
        for block in (32, None)
        for how in (
            {"operator": "Gemm"},
            {"operator": "Gemm", "stored": "NK"},
            {"stored": "NK"},
            {"readers": 2},
            {"operator": "Gather"},
        )
    ),
]


@pytest.mark.parametrize(("format_name", "block", "how"), CASES)
def test_rules_agree_with_onnxruntime(tmp_path, format_name, block, how):
    path = tmp_path / "m.onnx"
    onnx.save(model(format_name, block, **how), path)
    (layer,) = inspect_onnx(path).layers
    fused = "MatMulNBits" in operators_after_optimisation(path, tmp_path)
    assert (layer.fused["cpu"].kernel == "MatMulNBits") == fused, layer.fused["cpu"]
    assert fused or layer.fused["cpu"].reason
    assert layer.format == format_name
    assert layer.group_size == (block or None)
    assert layer.granularity == (
        "per tensor" if block == 0 else "per channel" if block is None else f"per group of {block}"
    )


@pytest.mark.parametrize("format_name", ["int8", "int6", "int4", "int3", "int2", "ternary"])
def test_a_format_without_a_tensor_of_its_own_is_fused_as_the_one_that_holds_it(format_name):
    row: dict[str, Any] = {"format": format_name, "group_size": 32, "shape": [64, 64]}
    assert [found.kernel for found in fused_forms(use_of(row)).values()] == ["MatMulNBits", "MatMulNBits"]


@pytest.mark.parametrize(("format_name", "kernel"), [("int8", "MatMulIntegerToFloat"), ("int6", "MatMulIntegerToFloat"),
                                                     ("int4", None), ("ternary", None)])  # fmt: skip
def test_rows_with_quantised_activations(format_name, kernel):
    row: dict[str, Any] = {
        "format": format_name,
        "shape": [64, 64],
        "activation_format": "int8",
        "activation_scales": "static",
    }
    assert fused_forms(use_of(row))["cpu"].kernel == kernel


def test_quantised_activations():
    forms = fused_forms(WeightUse("int8", None, activation_format="int8"))
    assert forms["cpu"].kernel == "MatMulIntegerToFloat"
    assert forms["cuda"].kernel is None
    assert "int8" in forms["cuda"].reason
