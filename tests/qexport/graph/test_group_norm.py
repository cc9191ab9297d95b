"""`GroupNormAsLayerNorm` against onnx.reference: the graph before and after computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qexport.graph.passes.group_norm import GroupNormAsLayerNorm

RNG = np.random.default_rng(0)


def model_of(groups: int, channels: int, epsilon: float) -> onnx.ModelProto:
    parameters = {name: RNG.normal(size=channels).astype(np.float32) for name in ("scale", "bias")}
    graph = helper.make_graph(
        [helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=groups, epsilon=epsilon)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", channels, "h", "w"))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", channels, "h", "w"))],
        [numpy_helper.from_array(array, name) for name, array in parameters.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@pytest.mark.parametrize("epsilon", [1e-6, 1e-1], ids=str)
@pytest.mark.parametrize(("groups", "channels"), [(1, 4), (2, 6), (4, 4)])
def test_same_numbers(groups, channels, epsilon):
    before = model_of(groups, channels, epsilon)
    x = (RNG.normal(size=(2, channels, 3, 5)) * 3 + 1).astype(np.float32)
    want = ReferenceEvaluator(before).run(None, {"x": x})[0]
    model = ir.serde.deserialize_model(before)
    assert GroupNormAsLayerNorm()(model).modified
    assert "GroupNormalization" not in {node.op_type for node in model.graph}
    after = ir.serde.serialize_model(model)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(ReferenceEvaluator(after).run(None, {"x": x})[0], want, rtol=1e-5, atol=1e-5)


def test_a_graph_without_one_is_left_alone():
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2,))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2,))],
    )
    assert not GroupNormAsLayerNorm()(ir.serde.deserialize_model(helper.make_model(graph))).modified
