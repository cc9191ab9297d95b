"""What keeps a lowered graph on a GPU: operators that have a CUDA kernel, and shapes that no input decides.

ONNX Runtime runs an operator without a kernel on the CPU and copies its tensors there and back. Operands that its CUDA
kernels want in the host's memory (counts, shapes, widths) are copied and waited for at every run if they are computed
from inputs, and the graph cannot be captured as a CUDA graph. Sizes of tensors are known to the host.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from lowering import graph_of, lowered

from qexport.lower.graphs import read_graph

WITHOUT_KERNEL = {
    ("", "InstanceNormalization"): 22, ("", "DynamicQuantizeLinear"): 1, ("", "QLinearMatMul"): 1,
    ("com.microsoft", "DynamicQuantizeMatMul"): 1, ("com.microsoft", "MatMulIntegerToFloat"): 1,
}  # fmt: skip
"""From which version of their domain on they have no CUDA kernel: docs/OperatorKernels.md of ONNX Runtime and, for the
first, where it ran on an H100 (1.31.1). They are what a graph of ours once had, or what integer kernels of the CPU are.
"""

IN_HOST_MEMORY = {
    "TopK": (1,), "Pad": (1,), "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "ConstantOfShape": (0,),
    "Range": (0, 1, 2), "Resize": (1, 2, 3), "Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,), "Tile": (1,),
}  # fmt: skip
"""Operands that decide a shape, by operator."""

GRAPHS = [
    ("dit_bundle", "denoise"), ("dit_bundle", "decode"), ("dit_float_bundle", "denoise"), ("w4_bundle", "step"),
    ("w4_bundle", "decode"), ("llamagen_bundle", "token"), ("llamagen_bundle", "decode"),
]  # fmt: skip


def without_kernel(model: ir.Model) -> list[str]:
    versions = model.graph.opset_imports
    return [
        f"{node.op_type} {node.name}"
        for node in model.graph
        if versions.get(node.domain, 0) >= WITHOUT_KERNEL.get((node.domain, node.op_type), 1 << 30)
    ]


def decided_by_inputs(model: ir.Model) -> list[str]:
    return [
        node.op_type
        for node in model.graph
        for place in IN_HOST_MEMORY.get(node.op_type, ()) if node.domain == ""
        if place < len(node.inputs) and _from_inputs(node.inputs[place])
    ]  # fmt: skip


def _from_inputs(value: ir.Value | None) -> bool:
    """Whether the numbers, not the sizes, of an input of the graph flow into a value."""
    if value is None or value.is_initializer():
        return False
    node = value.producer()
    if node is None:
        return True
    return node.op_type not in ("Shape", "Size") and any(_from_inputs(source) for source in node.inputs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bundle", "graph"), GRAPHS)
def test_lowered_graphs_stay_on_the_gpu(bundle, graph, dtype, request):
    model = lowered(request.getfixturevalue(bundle).path / f"{graph}.onnx", "ort-cuda", dtype)
    assert without_kernel(model) == []
    assert decided_by_inputs(model) == []


def test_the_count_of_the_portable_graph_is_seen(w4_bundle):
    assert sorted(decided_by_inputs(read_graph(w4_bundle.path / "step.onnx"))) == ["Pad", "TopK"]


@pytest.mark.parametrize(("version", "found"), [(21, 0), (22, 1)])
def test_an_instance_norm_is_seen_from_the_version_on_that_has_no_kernel(version, found):
    text = "g (float[B, 2, L] x) => (float[B, 2, L] y) { y = InstanceNormalization (x, one, zero) }"
    model = graph_of(text, one=np.ones(2, np.float32), zero=np.zeros(2, np.float32))
    model.graph.opset_imports[""] = version
    assert len(without_kernel(model)) == found


def test_sizes_are_known_to_the_host():
    text = """g (float[B, 4] x, int64[1] n) => (float[N, M] y, float[N, M] z) {
        s = Shape (x)
        y = Reshape (x, s)
        t = Concat <axis = 0> (n, four)
        z = Expand (x, t)
    }"""
    assert decided_by_inputs(graph_of(text, four=np.array([4]))) == ["Expand"]
