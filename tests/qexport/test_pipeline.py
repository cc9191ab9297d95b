"""The spine: what a bundle of a real model holds, and that it is the same every time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.pipeline import quantize
from qexport.recipe import Recipe, Rule
from qexport.recipe_toml import read_recipe
from qexport.runtime import load
from qexport.scheme import preset

MODEL = "var-c10-d2"
BLOCK_WEIGHTS = 2 * (128 * 384 + 128 * 128 + 2 * 128 * 512 + 128 * 768)


@pytest.fixture
def bundle(w4_bundle) -> Bundle:
    return w4_bundle


def graph(bundle: Bundle, name: str) -> onnx.ModelProto:
    return onnx.load(bundle.path / f"{name}.onnx", load_external_data=False)


def test_every_block_matrix_is_packed_int4_behind_a_dequantize(bundle):
    step = graph(bundle, "step").graph
    initializers = {tensor.name: tensor for tensor in step.initializer}
    consumers = {name: node for node in step.node for name in node.input}
    layers = [row["name"] for row in bundle.manifest.layers if row["algorithm"]]
    assert len(layers) == 10
    for layer in layers:
        weight, scale = initializers[f"{layer}.weight"], initializers[f"{layer}.weight_scale"]
        assert weight.data_type == onnx.TensorProto.INT4
        assert scale.data_type == onnx.TensorProto.FLOAT16
        assert list(scale.dims) == [weight.dims[0] // 32, weight.dims[1]]
        dequantize = consumers[weight.name]
        assert dequantize.op_type == "DequantizeLinear"
        matmul = consumers[dequantize.output[0]]
        assert (matmul.op_type, matmul.name, matmul.input[1]) == ("MatMul", layer, dequantize.output[0])


def test_standard_operators_only_and_no_trace_of_this_machine(bundle):
    for name in ("step", "decode"):
        model = graph(bundle, name)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
        assert not model.functions
        assert all(node.domain == "" and not node.metadata_props and not node.doc_string for node in model.graph.node)
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert b"/home" not in (bundle.path / "step.onnx").read_bytes()
    assert b".py" not in (bundle.path / "step.onnx").read_bytes()


def test_each_weight_lies_once_in_the_weight_file(bundle):
    spans = []
    for name in ("step", "decode"):
        for tensor in graph(bundle, name).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                assert place["location"] == "weights.data"
                spans.append((int(place["offset"]), int(place["length"])))
            else:
                assert len(tensor.raw_data) < 8192, f"{tensor.name} is inside the graph"
    spans += [(t.offset, t.nbytes) for t in bundle.plan.tables.values()]
    spans.sort()
    assert all(a + length <= b for (a, length), (b, _) in pairwise(spans))
    # What is not a tensor is alignment: less than a page for each.
    assert sum(length for _, length in spans) > (bundle.path / "weights.data").stat().st_size - 4096 * len(spans)


def test_bits_are_counted_with_scales(bundle):
    totals = bundle.manifest.totals
    assert totals["weights_quantized"] == BLOCK_WEIGHTS
    assert totals["size_bytes_quantized"] == BLOCK_WEIGHTS // 2 + BLOCK_WEIGHTS // 32 * 2
    assert totals["bits_per_weight_quantized"] == 4.5
    assert totals["share_of_fp16_quantized"] == 0.28125


def test_the_same_input_gives_the_same_bytes(bundle, tmp_path):
    again = quantize(MODEL, scheme=preset(4), out=tmp_path / "again")
    assert again.manifest.digest == bundle.manifest.digest
    for name in ("manifest.json", "weights.data", "step.onnx", "decode.onnx", "recipe.toml"):
        assert (again.path / name).read_bytes() == (bundle.path / name).read_bytes()


def test_the_recipe_in_the_bundle_replays_it(bundle, tmp_path):
    again = quantize(MODEL, recipe=read_recipe(bundle.path / "recipe.toml"), out=tmp_path / "replayed")
    assert again.manifest.digest == bundle.manifest.digest


@pytest.mark.parametrize("bits", [16, 8, 3, 2])
def test_other_widths_play(bits, tmp_path):
    made = quantize(MODEL, scheme=preset(bits), out=tmp_path / "made")
    for options in ("exact", "serve"):
        images = load(made.path, provider="cpu", options=options).generate([1, 8], batch=2)
        assert images.shape == (2, 3, 32, 32)
        assert np.isfinite(images).all()
    if bits == 2:
        step = graph(made, "step")
        assert {t.data_type for t in step.graph.initializer if t.name.endswith("fc1.weight")} == {onnx.TensorProto.INT2}


def test_a_recipe_may_name_the_head_and_keep_a_layer(tmp_path):
    spec = preset(4).weight
    recipe = Recipe("mixed", (Rule("blocks.1.*", None), Rule("head", preset(8).weight), Rule("blocks.*", spec)))
    made = quantize(MODEL, recipe=recipe, out=tmp_path / "mixed")
    formats = {row["name"]: row["format"] for row in made.manifest.layers}
    assert formats["head"] == "int8"
    assert formats["blocks.0.ffn.fc1"] == "int4"
    assert formats["blocks.1.ffn.fc1"] == "float16"
    assert load(made.path, provider="cpu").generate([0], batch=1).shape == (1, 3, 32, 32)


def test_a_layer_that_is_no_linear_layer_cannot_be_quantised(tmp_path):
    with pytest.raises(InputError, match="matches none"):
        quantize(MODEL, recipe=Recipe("x", (Rule("quantize.embedding", preset(8).weight),)), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_group_sizes_that_do_not_divide_are_named(tmp_path):
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.mat_qkv.*groups of 48.*128"):
        quantize(MODEL, scheme=preset(4, group_size=48), out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_scheme_and_recipe_together_are_refused(tmp_path):
    with pytest.raises(InputError, match="one of scheme, request and recipe"):
        quantize(MODEL, scheme=preset(4), recipe=Recipe("x", ()), out=tmp_path / "x")


def test_activation_widths_say_what_is_there():
    with pytest.raises(InputError, match="--abits 5 is not available"):
        preset(4, abits=5)
