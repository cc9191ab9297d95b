"""One graph on its way: read with shapes, rewritten, and written with its new tensors in the target's own file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qexport.bundle import WeightFileWriter
from qexport.graph.passes.attach import ONNX_NAMES
from qexport.lower.rewrite import Rewrite
from qexport.targets.keys import DTYPE_KEY

EXTERNAL_BYTES = 1024
"""New tensors from this size on go to the weight file; smaller ones (shapes, scalars) stay in the graph."""

FILE_NAMES = {onnx_name: name for name, onnx_name in ONNX_NAMES.items()}
"""Element types as the weight file spells them."""

PRODUCER = "qexport lower"


@dataclass(frozen=True)
class RewriteCount:
    """What one rewrite did to one graph: how many places it rewrote, and how many it refused for which reason."""

    rewritten: int
    refused: Mapping[str, int] = field(default_factory=dict)


def read_graph(file: Path) -> ir.Model:
    """A portable graph with shapes inferred; weights stay in their file until they are asked for."""
    model = ir.load(file)
    common.ShapeInferencePass()(model)
    return model


def rewrite(model: ir.Model, rewrites: Sequence[Rewrite]) -> dict[str, RewriteCount]:
    """Apply the rewrites in order; what each did, by name. Nothing changed where all counts are 0."""
    found = {}
    standard = True  # once there are operators that ONNX does not know, shapes cannot be inferred through them
    for step in rewrites:
        if step(model).modified:
            common.RemoveUnusedNodesPass()(model)
            standard = standard and all(node.domain == "" for node in model.graph)
            if standard:
                common.ShapeInferencePass()(model)
        reasons = Counter(refusal.reason for refusal in step.refused)
        found[step.name] = RewriteCount(len(step.rewritten), dict(reasons))
    return found


def write_graph(
    model: ir.Model, root: Path, relative: str, weights: WeightFileWriter, location: str, dtype: str
) -> None:
    """Write the graph to `relative` below the bundle `root`, and its new tensors to `weights`.

    Locations of external data are relative to `root`, as `qexport.runtime.session` reads graphs in subfolders.

    Args:
        model: the rewritten graph; its external tensors still point into the shared weight file.
        root: the bundle that is being written.
        relative: path of the .onnx file below `root`.
        weights: the target's weight file.
        location: its path below `root`.
        dtype: what the graph computes in, noted in its metadata.
    """
    graph = model.graph
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < EXTERNAL_BYTES:
            continue
        shape = tuple(tensor.shape.numpy())
        ref = weights.add(f"{graph.name}/{name}", tensor.tobytes(), FILE_NAMES[tensor.dtype.name], shape)
        value.const_value = ir.ExternalTensor(
            location, ref.offset, ref.nbytes, tensor.dtype, name=name, shape=ir.Shape(shape), base_dir=root
        )
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None  # the symbols that inference made up mean nothing to a reader
    model.producer_name = PRODUCER
    model.metadata_props[DTYPE_KEY] = dtype
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString(deterministic=True))


def check_graph(path: Path) -> None:
    """Check a written graph; bytes that lie in other files are taken to be there.

    Raises:
        onnx.checker.ValidationError: the graph is not valid ONNX; a defect of qexport.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    external = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:  # the checker would look for them beside the file
        graph.initializer.remove(tensor)
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model)
