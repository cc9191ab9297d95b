"""The least time that a graph could take on the device, and what share of it is reached.

    floor = max(flops / ceiling of flops, bytes / ceiling of bytes)        share = floor / measured

`flops` are those of products, attention and convolutions (`qexport.lower.work`). `bytes` are what must be moved however
well kernels are fused: every weight once a call, in the form in which the kernel reads it, and the ports of the graph;
intermediate values are left out, since they may stay in caches. So the floor is a true lower bound, and a share of 0.5
means that at most a factor of two is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qexport.bench.ceilings import Ceilings
from qexport.lower.work import GraphWork
from qexport.targets.keys import DTYPE_KEY

BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT64: 64, onnx.TensorProto.INT32: 32,
}  # fmt: skip
"""Of an element; all others have 8, but for the two below, which not every version of onnx knows."""
BITS |= {getattr(onnx.TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)}

COMPUTE, MEMORY = "compute", "memory"


@dataclass(frozen=True)
class Roofline:
    """One graph over one batch: its work, the floor in milliseconds, which ceiling makes it, and the share reached."""

    flops: float
    bytes: float
    floor_ms: float
    bound: str
    share: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "flops": self.flops, "bytes": self.bytes, "floor_ms": self.floor_ms,
            "bound": self.bound, "share": self.share,
        }  # fmt: skip


def roofline(work: GraphWork, weight_bytes: float, measured_ms: float, ceilings: Ceilings) -> Roofline:
    """The roofline of a graph that took `measured_ms` in all calls of a batch and reads `weight_bytes` in each."""
    moved = work.calls * weight_bytes + work.port_bytes
    compute_s, memory_s = work.flops / ceilings.flops_per_s, moved / ceilings.bytes_per_s
    floor_ms = max(compute_s, memory_s) * 1e3
    bound = COMPUTE if compute_s >= memory_s else MEMORY
    return Roofline(work.flops, moved, floor_ms, bound, floor_ms / measured_ms if measured_ms else math.nan)


def weight_bytes(file: Path) -> float:
    """What a call of the graph must read of its constants, in bytes.

    Codes that a DequantizeLinear reads count as stored; those that are cast, once at load, count in the type that the
    graph computes in. Tables from which rows are gathered do not count.
    """
    model = onnx.load(str(file), load_external_data=False)
    dtype = next((entry.value for entry in model.metadata_props if entry.key == DTYPE_KEY), "float32")
    computed = 16 if dtype == "float16" else 32
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, set()).add("table" if node.op_type == "Gather" and place == 0 else node.op_type)
    total = 0.0
    for tensor in model.graph.initializer:
        by = readers.get(tensor.name, set())
        if by and by != {"table"}:
            bits = computed if by == {"Cast"} else BITS.get(tensor.data_type, 8)
            total += math.prod(tensor.dims) * bits / 8
    return total
