"""What is left of a transformer block after lowering for CUDA, counted; no GPU is needed for that.

The small models have the same blocks as the published ones, so their counts are tested always, and those of DiT-XL/2
and var-d16 where there is time (`slow`).
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import published_shapes
import pytest
from lowering import lowered

from qexport.lower.graphs import read_graph
from qexport.lower.matrices import read_matrix
from qexport.lower.rewrite import producer
from qexport.targets.fusion import MAX_BLOCK, MIN_BLOCK

TARGET = "ort-cuda"

DIT_BLOCK = {
    # Two products of the block's own and, for int4, the projection that the fused attention takes in fp16.
    "MatMul": 4, "Attention": 1, "com.microsoft.FastGelu": 1,
    "LayerNormalization": 2, "com.microsoft.SkipLayerNormalization": 0,
    "Split": 1, "Mul": 2, "Add": 5, "Reshape": 0,
}  # fmt: skip
"""x·W of qkv, proj, fc1, fc2; adds: three biases and two residuals; multiplications: two gates. The norms scale and
shift, so that nothing of the modulation is left."""

DIT_BLOCK_FP = {**DIT_BLOCK, "MatMul": 3, "Attention": 0, "com.microsoft.Attention": 1, "Split": 0, "Add": 4}

VAR_BLOCK = {**DIT_BLOCK, "RMSNormalization": 2, "Mul": 3, "Reshape": 4}
"""Cosine attention: two norms, the factor for each head, and reshapes, which move nothing."""


def block(model: ir.Model, number: int) -> Counter[str]:
    """Operators of one block; what a runtime folds (casts, dequantisation) left out."""
    folded = {"Cast", "DequantizeLinear"}
    prefixes = (f"blocks.{number}.", f"blocks.{number}/")
    found: Counter[str] = Counter()
    for node in model.graph:
        own = (node.name or "").startswith(prefixes) and "_more" not in (node.name or "")
        constant = node.inputs[0] is not None and _from_parameters(node.inputs[0])
        if own and node.op_type not in folded and not constant:
            found[f"{node.domain}.{node.op_type}" if node.domain else node.op_type] += 1
    return found


def _from_parameters(value: ir.Value) -> bool:
    """Whether a value is made of parameters alone, so that a runtime computes it once."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return all(source is None or _from_parameters(source) for source in node.inputs)


def check_block(model: ir.Model, number: int, expected: dict[str, int]) -> None:
    found = block(model, number)
    if number == 0:  # the condition's SiLU is counted with the first block
        expected = expected | {"Mul": expected["Mul"] + 1}
    assert {name: found[name] for name in expected} == expected
    for absent in ("Transpose", "Unsqueeze", "Slice", "Gather", "Concat", "Gelu", "Div"):
        assert found[absent] == expected.get(absent, 0), (absent, found)


def check_weights(model: ir.Model, layers: int) -> None:
    """Every dequantised weight meets the conditions of MatMulNBits, and its bias does not spoil the fast kernels."""
    quantised = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(quantised) == layers
    for node in quantised:
        output = node.outputs[0]
        matrix = read_matrix(output)
        assert matrix is not None, node.name  # a constant [K, N] with axis 0 and blocks, or a scale per channel
        assert len(node.inputs) == 2, node.name  # no zero point
        assert matrix.block & (matrix.block - 1) == 0, node.name
        assert matrix.block == 0 or MIN_BLOCK <= matrix.block <= MAX_BLOCK, node.name
        readers = list(output.uses())
        assert [(use.node.op_type, use.idx) for use in readers] == [("MatMul", 1)], node.name
        for use in readers[0].node.outputs[0].uses():
            if use.node.op_type == "Add" and use.node.domain == "":
                bias = use.node.inputs[1 - use.idx]
                assert bias is not None
                assert bias.shape is None or len(bias.shape) == 3, use.node.name


def check_no_bias_before_a_fusable_operator(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in ("Gelu", "FastGelu", "BiasGelu"):
            assert producer(node.inputs[0], "Add") is None, node.name


def check_norms_modulate(model: ir.Model, count: int) -> None:
    """Every norm takes scale and shift, one row for each sample, from the product of all modulations."""
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert len(norms) == count
    for node in norms:
        assert len(node.inputs) == 3, node.name
        assert all(value is not None and not _from_parameters(value) for value in node.inputs), node.name


def apart(model: ir.Model) -> int:
    """Nodes that take the product of all modulations apart."""
    names = [str(node.name) for node in model.graph if node.op_type in ("Split", "Slice")]
    return len([name for name in names if "_more/" in name])


def modulation_products(model: ir.Model) -> list[str]:
    return [str(node.name) for node in model.graph if node.op_type == "MatMul" and ".ada" in str(node.name)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("bundle", "graph", "expected", "quantised"),
    [
        ("dit_bundle", "denoise", DIT_BLOCK, 1 + 2 * 4),
        ("dit_float_bundle", "denoise", DIT_BLOCK_FP, 0),
        ("w4_bundle", "step", VAR_BLOCK, 1 + 2 * 4),
    ],
)
def test_small_models(bundle, graph, expected, quantised, dtype, request):
    model = lowered(request.getfixturevalue(bundle).path / f"{graph}.onnx", TARGET, dtype)
    for number in range(2):
        check_block(model, number, expected)
    check_norms_modulate(model, 2 * 2 + 1)
    check_weights(model, quantised)
    check_no_bias_before_a_fusable_operator(model)
    assert len([name for name in modulation_products(model) if "blocks" in name]) == 1
    assert apart(model) == 1


def test_the_portable_graph_would_not_pass(w4_bundle):
    model = read_graph(w4_bundle.path / "step.onnx")
    with pytest.raises(AssertionError):
        check_block(model, 1, VAR_BLOCK)
    with pytest.raises(AssertionError):
        check_no_bias_before_a_fusable_operator(model)
    with pytest.raises(AssertionError):
        check_norms_modulate(model, 2 * 2 + 1)
    assert len(modulation_products(model)) == 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits", "expected", "depth", "splits"),
    [
        ("dit-xl-2-256", 4, DIT_BLOCK, 28, 1 + 6),  # 168 parts; those of the last layer are a product of their own
        ("dit-xl-2-256", 16, DIT_BLOCK_FP, 28, 2 + (1 + 5) + 1),  # 170 parts: 5 times 32, and 10
        ("var-d16", 4, VAR_BLOCK, 16, 1 + 3),  # 96 parts
    ],
)
def test_published_size(tmp_path, name, bits, expected, depth, splits):
    model = lowered(published_shapes.write(name, bits, tmp_path), TARGET, "float16")
    for number in range(depth):
        check_block(model, number, expected)
    check_norms_modulate(model, 2 * depth + 1)
    check_weights(model, layers=1 + 4 * depth if bits == 4 else 0)
    check_no_bias_before_a_fusable_operator(model)
    assert apart(model) == splits
    if name.startswith("dit"):  # the coefficients of a step
        assert [
            node.op_type for node in model.graph if node.inputs[0] is not None and node.inputs[0].name == "row"
        ] == ["Split"]
    joined = [found for found in modulation_products(model) if "_more" in found]
    assert len(joined) == 1
    if bits == 16:  # the last layer's modulation is stored alike, so it is in the same product
        assert modulation_products(model) == joined
