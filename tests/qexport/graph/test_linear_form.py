"""`LinearForm` against onnx.reference: the graph before and after computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qexport.graph.passes.linear import TRANSPOSED, LinearForm

RNG = np.random.default_rng(0)
W_NK = RNG.normal(size=(5, 4)).astype(np.float32)
B_N = RNG.normal(size=5).astype(np.float32)


def model_of(nodes, shape) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(W_NK, "layer.weight"), numpy_helper.from_array(B_N, "layer.bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


LINEAR_3D = [
    helper.make_node("Transpose", ["layer.weight"], ["wt"], perm=[1, 0]),
    helper.make_node("MatMul", ["x", "wt"], ["m"]),
    helper.make_node("Add", ["m", "layer.bias"], ["y"]),
]
GEMM = [helper.make_node("Gemm", ["x", "layer.weight", "layer.bias"], ["y"], transB=1)]
GEMM_NO_BIAS = [helper.make_node("Gemm", ["x", "layer.weight"], ["y"], transB=1)]


@pytest.mark.parametrize(
    ("nodes", "shape"), [(LINEAR_3D, (2, 3, 4)), (GEMM, (3, 4)), (GEMM_NO_BIAS, (3, 4))], ids=["3d", "gemm", "no bias"]
)
def test_same_numbers_from_a_transposed_weight(nodes, shape):
    before = model_of(nodes, shape)
    x = RNG.normal(size=shape).astype(np.float32)
    want = ReferenceEvaluator(before).run(None, {"x": x})[0]

    model = ir.serde.deserialize_model(before)
    weight = model.graph.initializers["layer.weight"]
    weight.const_value = None
    assert LinearForm()(model).modified
    assert weight.meta[TRANSPOSED]
    assert [node.op_type for node in model.graph if node.op_type in ("Gemm", "Transpose")] == []
    weight.const_value = ir.tensor(np.ascontiguousarray(W_NK.T), name="layer.weight")
    got = ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Gemm", ["x", "layer.weight"], ["y"], transB=1, alpha=2.0)],
        [
            helper.make_node("Transpose", ["layer.weight"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "wt"], ["m"]),
            helper.make_node("ReduceSum", ["layer.weight"], ["s"]),
            helper.make_node("Add", ["m", "s"], ["y"]),
        ],
        [helper.make_node("Gather", ["layer.weight", "x"], ["y"])],
    ],
    ids=["scaled", "used twice", "embedding"],
)
def test_what_is_no_plain_linear_layer_is_left_alone(nodes):
    model = ir.serde.deserialize_model(model_of(nodes, (3, 4)))
    model.graph.initializers["layer.weight"].const_value = None
    assert not LinearForm()(model).modified
    assert [n.op_type for n in model.graph] == [n.op_type for n in nodes]
