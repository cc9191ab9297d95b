"""Floors worked out by hand, and what a graph must read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qexport.bench.ceilings import Ceilings, measure_ceilings
from qexport.bench.roofline import roofline, weight_bytes
from qexport.lower.work import GraphWork

CEILINGS = Ceilings(bytes_per_s=1e9, flops_per_s=1e12, dtype="float32")


def test_the_higher_floor_counts():
    compute = roofline(GraphWork(calls=2, flops=4e9, port_bytes=0), 1e6, 8.0, CEILINGS)
    assert (compute.bound, compute.floor_ms, compute.share) == ("compute", 4.0, 0.5)
    memory = roofline(GraphWork(calls=2, flops=4e9, port_bytes=6_000_000), 1e6, 16.0, CEILINGS)
    assert (memory.bound, memory.bytes, memory.floor_ms, memory.share) == ("memory", 8e6, 8.0, 0.5)


def test_weights_count_as_the_kernel_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    codes = helper.make_tensor("codes", TensorProto.INT4, (64, 32), rng.integers(-8, 8, 64 * 32).tolist())
    scale = numpy_helper.from_array(np.ones((2, 32), np.float32), "scale")
    stored = numpy_helper.from_array(np.ones((32, 8), np.float16), "stored")
    table = numpy_helper.from_array(np.ones((1000, 64), np.float32), "table")
    nodes = [
        helper.make_node("Gather", ["table", "label"], ["x"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Cast", ["stored"], ["v"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [codes, scale, stored, table],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    assert weight_bytes(tmp_path / "g.onnx") == 64 * 32 / 2 + 2 * 32 * 4 + 32 * 8 * 4  # fp16 folds to float32 at load


def test_ceilings_of_this_device():
    found = measure_ceilings("cpu", 1)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e14
    best = found.best(Ceilings(1.0, 1e15, "float32"))
    assert (best.bytes_per_s, best.flops_per_s) == (pytest.approx(found.bytes_per_s), 1e15)
