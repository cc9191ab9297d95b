"""What a saved ONNX graph stores: bytes, and in which form the weight of each matrix product is kept.

    python benchmarks/graph_weights.py MODEL.onnx      prints JSON

Reads the graph alone, never the manifest of whoever wrote it, so that one measure serves every exporter.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

PACKED = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
PRODUCTS = ("MatMul", "Gemm")
SAME_VALUES = ("Transpose", "Cast", "Reshape", "Identity")


def graph_weights(path: Path) -> dict[str, Any]:
    """`size_bytes` (the .onnx file and the external data it refers to), and matrix products by storage of the weight.

    `matrices` counts products with a stored matrix: ``int4``, ``float16``, ``float32``; `kept_wide` names those that
    are not int4 and have 100,000 weights or more.
    """
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    counts: Counter[str] = Counter()
    wide: list[str] = []
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            counts["int4"] += 1
        if node.op_type not in PRODUCTS or len(node.input) < 2:
            continue
        source = node.input[1]
        while source in made_by and made_by[source].op_type in (*SAME_VALUES, "DequantizeLinear"):
            source = made_by[source].input[0]
        if source not in stored or len(stored[source].dims) < 2:
            continue
        kind = "int4" if stored[source].data_type in PACKED else _name(stored[source].data_type)
        counts[kind] += 1
        if kind != "int4" and math.prod(stored[source].dims) >= 100_000:
            wide.append(source)
    external = {
        (info["location"], int(info.get("offset", 0))): int(info["length"])
        for tensor in stored.values()
        if (info := {entry.key: entry.value for entry in tensor.external_data})
    }
    return {
        "onnx_bytes": path.stat().st_size,
        "weight_bytes": sum(external.values()),
        "size_bytes": path.stat().st_size + sum(external.values()),
        "nodes": len(model.graph.node),
        "matrices": dict(counts),
        "kept_wide": len(wide),
        "kept_wide_examples": wide[:5],
    }


def _name(data_type: int) -> str:
    return {"FLOAT": "float32"}.get(name := onnx.TensorProto.DataType.Name(data_type), name.lower())


if __name__ == "__main__":
    print(json.dumps(graph_weights(Path(sys.argv[1]))))
