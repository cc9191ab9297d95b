"""Graphs of one operator or one layer, in memory, for measuring what a device does with them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnxruntime
from onnx import TensorProto, helper

from qexport.runtime.session import open_session, session_options
from qexport.targets import QuantTraits, session_config

OPSET, IR_VERSION = 23, 11
OPSET_OF_INT2, IR_OF_INT2 = 25, 13
"""The first that know 2-bit integers."""
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
PLAIN = QuantTraits()


def one_operator(op: str, shapes: Sequence[tuple[int, ...]], dtype: str) -> bytes:
    """``c = op(a, b)`` on inputs of these shapes."""
    kind = TYPES[dtype]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in zip("ab", shapes, strict=True)]
    output = helper.make_tensor_value_info("c", kind, None)
    return model_bytes([helper.make_node(op, ["a", "b"], ["c"])], inputs, [output], [])


def model_bytes(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initialisers: Sequence[TensorProto],
) -> bytes:
    """A model as a session takes it."""
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), list(outputs), list(initialisers))
    two_bit = any(tensor.data_type == TensorProto.INT2 for tensor in initialisers)
    opset, ir_version = (OPSET_OF_INT2, IR_OF_INT2) if two_bit else (OPSET, IR_VERSION)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    return model.SerializeToString()


def session_of(
    model: bytes, provider: str, threads: int | None = None, traits: QuantTraits = PLAIN
) -> tuple[onnxruntime.InferenceSession, str]:
    """A session under ``serve`` options, and the device that its IO binding uses."""
    config = session_config(provider, "serve", traits)
    return open_session(model, session_options(config, threads), config, "tiny graph"), config.device
