"""`qexport inspect`: figures held against the files themselves."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qexport.inspect.onnx_file import inspect_onnx


def inspected(run, path):
    outcome = run("inspect", path, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


def test_a_bundle(run, var):
    data = inspected(run, var)
    assert data["kind"] == "bundle"
    assert data["model"]["name"] == "var-c10-d2"
    quantized = [layer for layer in data["layers"] if layer["quantized"]]
    assert len(quantized) == 10
    for layer in quantized:
        weights = math.prod(layer["shape"])
        assert layer["bits_per_weight"] == 4.5
        assert layer["size_bytes"] == weights // 2 + weights // 32 * 2
        assert layer["fused"]["cpu"]["kernel"] == "MatMulNBits"
        assert 15 < layer["sqnr_db"] < 30
    graphs = {graph["name"]: graph for graph in data["graphs"]}
    assert graphs["step"]["operators"]["DequantizeLinear"] == 10
    assert graphs["step"]["size_bytes"] == (var / "step.onnx").stat().st_size


def test_a_bundle_in_words(run, var):
    outcome = run("inspect", var)
    for part in ("blocks.1.ffn.fc2", "128×512", "int4", "4.5", "10 × MatMulNBits expected", "graph step", "cfg=1.5"):
        assert part in outcome.out


def test_a_graph_of_a_bundle_gives_the_bundle_s_figures(run, var):
    bundle, step, decode = (inspected(run, path) for path in (var, var / "step.onnx", var / "decode.onnx"))
    assert step["totals"]["bits_per_weight_quantized"] == bundle["totals"]["bits_per_weight_quantized"]
    assert step["totals"]["size_bytes_quantized"] == bundle["totals"]["size_bytes_quantized"]
    assert step["totals"]["layers_quantized"] == 10
    assert decode["totals"]["layers_quantized"] == 0
    (external,) = step["external"]
    assert external["location"] == "weights.data"
    assert external["size_bytes"] == (var / "weights.data").stat().st_size >= external["needed_bytes"] > 0


def linear(weight: TensorProto, scale: np.ndarray, **attributes: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], **attributes),
        helper.make_node("MatMul", ["x", "wf"], ["y"]),
        helper.make_node("Add", ["y", "b"], ["z"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ("x", "z")]
    constants = [weight, numpy_helper.from_array(scale, "s"), numpy_helper.from_array(np.zeros(8, np.float32), "b")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_any_onnx_file_counted_by_hand(run, tmp_path):
    weight = helper.make_tensor("w", TensorProto.INT4, (64, 8), bytes(256), raw=True)
    path = tmp_path / "m.onnx"
    onnx.save(linear(weight, np.ones((2, 8), np.float16), axis=0, block_size=32), path)
    data = inspected(run, path)
    (layer,) = data["layers"]
    assert (layer["name"], layer["shape"], layer["format"], layer["group_size"]) == ("w", [64, 8], "int4", 32)
    assert layer["size_bytes"] == 64 * 8 // 2 + 2 * 8 * 2
    assert layer["bits_per_weight"] == 4.5
    assert data["totals"]["weights_all"] == 64 * 8 + 8
    assert data["totals"]["size_bytes_all"] == 64 * 8 // 2 + 2 * 8 * 2 + 8 * 4
    assert data["operators"] == {"Add": 1, "DequantizeLinear": 1, "MatMul": 1}
    assert data["opsets"] == {"ai.onnx": 21}
    assert data["inputs"] == {"x": ["n", "?"]}
    assert run("inspect", path).code == 0


def test_what_does_not_fuse_says_why(tmp_path):
    weight = helper.make_tensor("w", TensorProto.INT4, (64, 8), bytes(256), raw=True)
    path = tmp_path / "m.onnx"
    onnx.save(linear(weight, np.ones((8, 8), np.float16), axis=0, block_size=8), path)
    fusion = inspect_onnx(path).layers[0].fused["cpu"]
    assert fusion.kernel is None
    assert "blocks of 8" in fusion.reason


def test_missing_and_truncated_external_data(run, var, tmp_path):
    path = tmp_path / "step.onnx"
    path.write_bytes((var / "step.onnx").read_bytes())
    assert inspected(run, path)["external"][0]["size_bytes"] is None
    assert "weights.data (missing)" in run("inspect", path).out
    (tmp_path / "weights.data").write_bytes(bytes(1000))
    assert "truncated: 1000 bytes of" in run("inspect", path).out


def test_subgraphs_are_counted(tmp_path):
    then = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["t"])], "t", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then)
    ports = [
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
    ]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", ports, out)), tmp_path / "m.onnx")
    report = inspect_onnx(tmp_path / "m.onnx")
    assert report.operators == {"Neg": 2, "If": 1}
    assert report.layers == ()


@pytest.mark.parametrize("content", [b"", b"not an onnx file", bytes(100)])
def test_what_is_no_onnx_file(run, tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    outcome = run("inspect", path)
    assert (outcome.code, outcome.out) == (2, "")
    assert "not an ONNX model" in outcome.error


def test_a_damaged_bundle(run, toy, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    (copy / "weights.data").write_bytes(b"short")
    outcome = run("inspect", copy)
    assert outcome.code == 2
    assert "weights.data: truncated" in outcome.error


def test_nothing_there(run, tmp_path):
    assert "no such file" in run("inspect", tmp_path / "x.onnx").error
    assert "not a bundle" in run("inspect", tmp_path).error
