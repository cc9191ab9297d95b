"""The floating-point twin of a bundle computes what the bundle computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qexport.bench.reference import fold_weights, write_twin
from qexport.runtime import Player
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.session import make_session
from qexport.targets import QuantTraits, session_config

sys.path.insert(0, str(Path(__file__).parents[1] / "lower"))
from forced import recorded

FLOAT_LIMIT = 1e-5
"""Relative L2 of logits and states: other kernels sum in another order, 1e-6, and guidance subtracts."""

HALF_LIMIT = 5e-3
"""Weights rounded to 11 bits: 3e-4 of each product, in quadrature over layers."""


@pytest.mark.parametrize(("form", "limit"), [("fp32", FLOAT_LIMIT), ("fp16", HALF_LIMIT)])
def test_numbers_are_those_of_the_bundle(w4_bundle, tmp_path, form, limit):
    calls = recorded(w4_bundle.path, [1, 2])
    files = write_twin(w4_bundle, tmp_path, form, "cpu")
    config = session_config("cpu", "exact", QuantTraits())
    backend = OrtBackend({name: make_session(file, tmp_path, config, 1) for name, file in files.items()}, "cpu")
    Player(w4_bundle.plan, backend, w4_bundle.tables())  # it fits the plan
    worst = 0.0
    for call in calls[:2]:
        feeds = {name: backend.put(array) for name, array in call.feeds.items()}
        found = backend.run(call.graph, feeds, ("logits", "key.0"))
        for name, value in found.items():
            want = call.results[name].astype(np.float64)
            worst = max(worst, float(np.linalg.norm(value.numpy() - want) / np.linalg.norm(want)))
    assert 0 < worst <= limit
    graph = ir.load(files["step"]).graph
    assert not [node for node in graph if node.op_type in ("DequantizeLinear", "QuantizeLinear")]


def test_codes_with_blocks_and_zero_points_against_the_standard():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (8, 6)).astype(np.uint8)
    inputs = {
        "scale": rng.random((4, 6)).astype(np.float32), "zero": rng.integers(0, 256, (4, 6)).astype(np.uint8),
    }  # fmt: skip
    initialisers = [helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.reshape(-1).tolist())]
    initialisers += [
        helper.make_tensor("scale", TensorProto.FLOAT, (4, 6), inputs["scale"].reshape(-1).tolist()),
        helper.make_tensor("zero", TensorProto.UINT8, (4, 6), inputs["zero"].reshape(-1).tolist()),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"], axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6])], initialisers,
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    x = rng.normal(size=(3, 8)).astype(np.float32)
    want = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    model = ir.serde.deserialize_model(proto)
    model.graph.initializers["codes"].type = ir.TensorType(ir.DataType.UINT8)
    for node in model.graph:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    fold_weights(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(None, {"x": x})[0], want, rtol=1e-4)
