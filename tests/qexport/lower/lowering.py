"""What the tests of lowering share: graphs as text, a rewrite applied to them, and numbers before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper, parser
from onnx_ir.passes import common

from qexport.lower import graphs
from qexport.lower.passes.half import HalfPrecision
from qexport.lower.rewrite import Rewrite
from qexport.lower.targets import TARGETS

LIMIT = 1e-6
"""Relative L2 in float32: a rewrite reorders a few operations, each of which rounds by 6e-8."""

HEAD = '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'

RNG = np.random.default_rng(0)


def graph_of(text: str, **parameters: np.ndarray) -> ir.Model:
    """The graph in ONNX's text form, without its header, with initialisers added and shapes inferred."""
    proto = parser.parse_model(f"{HEAD}\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in parameters.items())
    model = ir.serde.deserialize_model(proto)
    common.ShapeInferencePass()(model)
    return model


def add_int4(model: ir.Model, name: str, codes_KN: np.ndarray) -> None:
    """Give the parameter `name` int4 codes."""
    tensor = helper.make_tensor(name, onnx.TensorProto.INT4, codes_KN.shape, codes_KN.reshape(-1).tolist())
    value = model.graph.initializers[name]
    value.const_value, value.dtype = ir.serde.deserialize_tensor(tensor), ir.DataType.INT4


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output, computed by ONNX Runtime's CPU provider node by node as the graph says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, session.run(names, dict(feeds)), strict=True)}


def worst(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> float:
    """Greatest relative L2 of any output; the names must be the same."""
    assert set(got) == set(want)
    return max(_relative(got[name], want[name]) for name in want)


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    difference = got.astype(np.float64) - want.astype(np.float64)
    return float(np.linalg.norm(difference) / max(np.linalg.norm(want.astype(np.float64)), 1e-30))


def rewritten(model: ir.Model, rewrite: Rewrite, feeds: Mapping[str, np.ndarray], times: int) -> None:
    """Apply a rewrite, and assert how often it fired and that the numbers are what they were."""
    want = run(model, feeds)
    rewrite(model)
    assert len(rewrite.rewritten) == times, rewrite.refused
    common.RemoveUnusedNodesPass()(model)
    assert worst(run(model, feeds), want) <= LIMIT


def refused(model: ir.Model, rewrite: Rewrite, reason: str) -> None:
    """Apply a rewrite that must leave the graph as it is, for a reason with these words (empty: it says nothing)."""
    before = [(node.op_type, [value.name if value else None for value in node.inputs]) for node in model.graph]
    result = rewrite(model)
    assert not result.modified
    assert [(node.op_type, [v.name if v else None for v in node.inputs]) for node in model.graph] == before
    reasons = [refusal.reason for refusal in rewrite.refused]
    assert any(reason in found for found in reasons) if reason else not reasons, reasons


def operators(model: ir.Model) -> list[str]:
    """Operators in order; those of other domains with their domain."""
    return [f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph]


def lowered(file: Path, target: str, dtype: str = "float32") -> ir.Model:
    """A portable graph with the rewrites of a target, in memory."""
    model = graphs.read_graph(file)
    steps = [step() for step in TARGETS[target].rewrites]
    graphs.rewrite(model, [*steps, HalfPrecision()] if dtype == "float16" else steps)
    return model
