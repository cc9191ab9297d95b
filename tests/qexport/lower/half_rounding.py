"""Float16 rounding spelt out in float32, since ONNX Runtime's CPU provider leaves most of it out.

That provider has few float16 kernels: it computes in float32 between casts, and drops casts that follow each other.
What a GPU rounds is shown by rounding every value that would be float16 to 11 significant bits (Veltkamp's splitting,
c = x · (2¹³ + 1), c − (c − x)), which float32 arithmetic does exactly and no optimiser takes out. Numbers below
float16's normal range, 6e-5, are rounded less than there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from qexport.lower.graphs import read_graph, rewrite
from qexport.lower.passes.half import HalfPrecision
from qexport.lower.targets import TARGETS

SPLITTER = np.array(2**13 + 1, np.float32)


def rounded_session(bundle: Path, graph: str) -> onnxruntime.InferenceSession:
    """A portable graph as `ort-cuda` rewrites it, in float32, with every value rounded that float16 would round."""
    model = read_graph(bundle / f"{graph}.onnx")
    rewrite(model, [step() for step in TARGETS["ort-cuda"].rewrites])
    _, values = HalfPrecision(convolutional=True).values(model.graph)
    names = {str(value.name) for value in values}
    proto = ir.serde.serialize_model(model)
    proto.graph.initializer.append(numpy_helper.from_array(SPLITTER, "splitter"))
    ordered = list(proto.graph.node)
    del proto.graph.node[:]

    def rounding(name: str) -> list:
        big, rest = f"{name}.big", f"{name}.rest"
        return [
            helper.make_node("Mul", [name, "splitter"], [big]),
            helper.make_node("Sub", [big, name], [rest]),
            helper.make_node("Sub", [big, rest], [f"{name}.rounded"]),
        ]

    made = {output for node in ordered for output in node.output}
    for name in sorted(names - made):  # inputs and parameters
        proto.graph.node.extend(rounding(name))
    for node in ordered:
        for place, name in enumerate(node.input):
            if name in names and (node.op_type != "Resize" or place == 0):
                node.input[place] = f"{name}.rounded"
        proto.graph.node.append(node)
        for name in node.output:
            if name in names:
                proto.graph.node.extend(rounding(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
