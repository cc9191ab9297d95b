"""The placement audit: what became of each layer, and that a layer without its kernel is a failed check."""

from __future__ import annotations

import json

import onnx
import pytest
from onnx import TensorProto, helper

from qexport.lower import lower
from qexport.verify.placement import (
    LARGEST_SETTING,
    MISSING,
    UNFUSED,
    GraphPlacement,
    Placement,
    _form,
    _ran,
    check_fusion,
    joined_weights,
    measure_placement,
)
from qexport.verify.rungs.placement import _check_fallback

ROW = {"name": "fc", "graph": "step", "shape": [8, 64], "format": "int4", "group_size": 32, "algorithm": "rtn"}


def placement(form: str) -> Placement:
    return Placement("cpu", {"serve": {"step": GraphPlacement({}, {}, {"fc": form})}})


def test_a_fused_layer_passes():
    check = check_fusion(placement("MatMulNBits (4 bit, block 32, int8 activations)"), [ROW])
    assert check.passed


@pytest.mark.parametrize("form", [f"DequantizeLinear + MatMul, {UNFUSED}", MISSING])
def test_a_layer_without_its_kernel_fails(form):
    check = check_fusion(placement(form), [ROW])
    assert not check.passed
    assert check.detail.startswith(f"fc: {form}")


def test_what_no_provider_fuses_may_be_unfused():
    row = {**ROW, "activation_format": "int8"}  # int4 with static int8 activations
    assert check_fusion(placement(f"DequantizeLinear + MatMul, {UNFUSED}"), [row]).passed
    assert not check_fusion(placement(f"DequantizeLinear + MatMul, {UNFUSED}"), [{**row, "format": "int8"}]).passed


def test_a_convolution_may_be_repacked_under_another_name():
    assert check_fusion(placement(MISSING), [{**ROW, "format": "int8", "shape": [8, 8, 3, 3]}]).passed


def test_a_float_layer_is_not_asked_for():
    assert check_fusion(placement("anything"), [{**ROW, "algorithm": None}]).passed


def graph(*nodes: onnx.NodeProto, constants: tuple[str, ...] = ()) -> onnx.GraphProto:
    initialisers = [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0]) for name in constants]
    return helper.make_graph(list(nodes), "g", [], [], initialisers)


def test_forms_are_read_off_the_optimised_graph():
    node = helper.make_node
    nbits = node("MatMulNBits", ["x", "fc.weight_T", "s"], ["y"], bits=4, block_size=32, accuracy_level=4)
    assert _form(graph(nbits), "fc.weight", {}) == "MatMulNBits (4 bit, block 32, int8 activations)"
    dequantize = node("DequantizeLinear", ["fc.weight", "s"], ["fc.weight/DequantizeLinear:0"])
    product = node("MatMul", ["x", "fc.weight/DequantizeLinear:0"], ["y"])
    assert UNFUSED in _form(graph(dequantize, product), "fc.weight", {})
    assert _form(graph(product, constants=("fc.weight/DequantizeLinear:0",)), "fc.weight", {}).endswith("at load")
    # A constant that ONNX Runtime did not fold is made at every run.
    scaled = node("Mul", ["fc.weight/dense.codes:0", "fc.weight/dense.scale:0"], ["fc.weight/dense/Mul:0"])
    assert UNFUSED in _form(graph(scaled, node("MatMul", ["x", "fc.weight/dense/Mul:0"], ["y"])), "fc.weight", {})
    joined = {"fc.weight": "both.weight", "other.weight": "both.weight"}
    one = node("MatMul", ["x", "both.weight"], ["y"])
    assert _form(graph(one), "fc.weight", joined) == "MatMul, in one product of 2 layers"
    assert _form(graph(one), "fc.weight", {}) == MISSING


def event(name: str, *inputs: tuple[str, list[int]], out: tuple[str, list[int]] = ("int64", [1])) -> dict:
    """A node that ran, as ONNX Runtime's profiles tell it."""
    facts = {
        "op_name": name, "provider": "CPUExecutionProvider",
        "input_type_shape": [{kind: shape} for kind, shape in inputs], "output_type_shape": [{out[0]: out[1]}],
    }  # fmt: skip
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": facts}


@pytest.mark.parametrize(
    ("ran", "large"),
    [
        ([event("InstanceNormalization", ("float", [2, 32, 4096]))], True),
        ([event("Expand", ("float", []), ("int64", [3]), out=("float16", [2, 32, 4096]))], True),
        ([event("Add", ("bfloat16", [LARGEST_SETTING + 1]))], True),
        ([event("Add", ("float", [LARGEST_SETTING]))], False),
        ([event("Concat", ("int64", [1]), ("int64", [3]), out=("int64", [4]))], False),
        ([event("Gather", ("int64", [50_000]), out=("int64", [50_000]))], False),
        ([event("Clip", ("float", []), out=("float", []))], False),
        ([event("Mul", ("float", [4096, 0]), out=("float", [4096, 0]))], False),
        ([event("Add", ("float", [2, 4096])), event("Add", ("float", [1]))], True),
    ],
    ids=["map", "made", "just above", "just below", "shape", "many whole numbers", "scalar", "empty", "once of twice"],
)
def test_a_fallback_is_heavy_by_what_it_moves(tmp_path, ran, large):
    profile = tmp_path / "profile.json"
    others = [{"cat": "Session", "name": "model_run"}, {"cat": "Node", "name": "Add_fence_before", "args": {}}]
    profile.write_text(json.dumps([*others, *ran]))
    name = ran[0]["args"]["op_name"]
    found = _ran(profile)
    assert {key: (node.op_type, node.provider) for key, node in found.items()} == {name: (name, "CPUExecutionProvider")}
    assert found[name].large == large


def test_a_heavy_fallback_fails_and_a_light_one_is_counted():
    shape, norm = ("Concat", "shape"), ("InstanceNormalization", "decoder/norm")
    light = GraphPlacement({}, {}, {}, fallback=[shape])
    heavy = GraphPlacement({}, {}, {}, fallback=[shape, norm], heavy=[norm])
    passed = _check_fallback(Placement("cuda", {"serve": {"step": light}}))
    assert passed.passed
    assert passed.detail == "1 nodes on the CPU in all"
    failed = _check_fallback(Placement("cuda", {"serve": {"step": light, "decode": heavy}, "exact": {"step": heavy}}))
    assert not failed.passed
    assert failed.place.graph == "decode"
    assert failed.detail.startswith("InstanceNormalization 'decoder/norm' ran on the CPU; 3 nodes")


def test_joined_layers_are_found(w4_bundle, tmp_path):
    import shutil

    from qexport.bundle import Bundle

    path = shutil.copytree(w4_bundle.path, tmp_path / "bundle")
    lower(path, "ort-cuda", dtype="float32")
    bundle = Bundle.open(path)
    file = bundle.graph_files("ort-cuda")["step"]
    parts = joined_weights(file)
    assert set(parts) == {"blocks.0.ada_lin.1.weight", "blocks.1.ada_lin.1.weight"}
    assert parts == {part: name for name, all_ in json.loads(_metadata(file)).items() for part in all_}
    found = measure_placement(bundle, "cpu", ("serve",), "ort-cuda")
    rows = [row for row in bundle.manifest.layers if row.get("algorithm")]
    assert found.surprises(rows) == []
    assert found.forms()["blocks.1.ada_lin.1"].endswith("in one product of 2 layers")
    # The audit knows joined layers only by what the graph says of itself.
    without = {name: _form(onnx.load(str(file), load_external_data=False).graph, name, {}) for name in parts}
    assert set(without.values()) == {MISSING}


def _metadata(file) -> str:
    model = onnx.load(str(file), load_external_data=False)
    return next(entry.value for entry in model.metadata_props if entry.key == "qexport.joined")
