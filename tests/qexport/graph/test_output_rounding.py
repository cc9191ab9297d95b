"""Pairs behind convolutions: where they stand, and that ONNX Runtime takes them in front of anything."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from qexport.formats import get_format
from qexport.graph.passes.outputs import QuantizeOutputs
from qexport.scheme import ActivationSpec
from qexport.solution import Activation

C, H, STEP = 4, 4, 0.25
OUTPUT = Activation(ActivationSpec(get_format("int8")), np.array(STEP, np.float32))

TEXT = f"""<ir_version: 10, opset_import: ["" : 21]>
g (float[B, {C}, {H}, {H}] x) => (float[B, 2, N] y) <int64[3] groups = {{0, 2, -1}}> {{
    c = Conv <kernel_shape = [1, 1]> (x, w, b)
    y = Reshape (c, groups)
}}"""


def model_of(text: str = TEXT) -> ir.Model:
    rng = np.random.default_rng(0)
    proto = parser.parse_model(text)
    for name, shape in (("w", (C, C, 1, 1)), ("b", (C,))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return ir.serde.deserialize_model(proto)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """At ONNX Runtime's default level of optimisation."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def rounded(y: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(y / np.float32(STEP)), -128, 127) * np.float32(STEP)


def test_what_comes_out_is_rounded_bias_and_all_in_front_of_a_reshape():
    """The form with a zero point on both nodes does not load: ONNX Runtime repeats it behind the Reshape."""
    x = np.random.default_rng(1).normal(size=(2, C, H, H)).astype(np.float32)
    model = model_of()
    before = run(model, x)
    assert QuantizeOutputs({"w": OUTPUT})(model).modified
    found = [node.op_type for node in model.graph]
    assert found == ["Conv", "QuantizeLinear", "DequantizeLinear", "Reshape"]
    np.testing.assert_array_equal(run(model, x), rounded(before))
    assert np.abs(run(model, x) - before).max() > STEP / 4


def test_an_output_of_the_graph_keeps_its_name():
    text = TEXT.replace("(float[B, 2, N] y)", f"(float[B, {C}, {H}, {H}] c)").replace(
        "    y = Reshape (c, groups)\n", ""
    )
    x = np.random.default_rng(1).normal(size=(1, C, H, H)).astype(np.float32)
    model = model_of(text)
    before = run(model, x)
    QuantizeOutputs({"w": OUTPUT})(model)
    assert [value.name for value in model.graph.outputs] == ["c"]
    np.testing.assert_array_equal(run(model, x), rounded(before))


@pytest.mark.parametrize("name", ["b", "groups", "absent"])
def test_only_weights_of_convolutions(name):
    with pytest.raises(ValueError, match="no weight of a Conv alone"):
        QuantizeOutputs({name: OUTPUT})(model_of())
