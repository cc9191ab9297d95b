"""From a captured graph and the places of its weights to a finished .onnx file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qexport.bundle import WeightRef
from qexport.graph.capture import parameter_names
from qexport.graph.passes.activations import QuantizeActivations
from qexport.graph.passes.attach import AttachWeights, is_convolution
from qexport.graph.passes.group_norm import GroupNormAsLayerNorm
from qexport.graph.passes.linear import TRANSPOSED, LinearForm
from qexport.graph.passes.names import ReadableNames
from qexport.graph.passes.outputs import QuantizeOutputs
from qexport.scheme import TensorSpec
from qexport.solution import Activation


def normalise(model: ir.Model) -> None:
    """Bring a captured graph into the form that weights are attached to; names are final after this."""
    for step in (
        common.IdentityEliminationPass(),
        LinearForm(),
        GroupNormAsLayerNorm(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        ReadableNames(),
    ):
        step(model)


def transposed_parameters(model: ir.Model) -> set[str]:
    """Parameters that the graph wants as (in, out)."""
    return {name for name in parameter_names(model) if model.graph.initializers[name].meta.get(TRANSPOSED)}


def convolution_weights(model: ir.Model) -> set[str]:
    """Parameters that are the weights of convolutions, in the order that torch stores them."""
    return {name for name in parameter_names(model) if is_convolution(model.graph.initializers[name])}


def quantize_activations(
    model: ir.Model,
    activations: Mapping[str, Activation],
    per_step: Sequence[str],
    outputs: Mapping[str, Activation] | None = None,
) -> None:
    """Quantise inputs of layers, and outputs of convolutions, by the names of their weights; before `attach`."""
    QuantizeActivations(activations, per_step)(model)
    QuantizeOutputs(outputs or {})(model)


def attach(
    model: ir.Model,
    refs: Mapping[str, WeightRef],
    quantized: Mapping[str, TensorSpec],
    location: str,
    folder: Path,
    activations: Mapping[str, Activation] | None = None,
) -> None:
    """Point the parameters at the weight file `location` in `folder`, and raise the opset if a format needs it.

    `activations` are those that `quantize_activations` was given.
    """
    integer = {name for name, value in (activations or {}).items() if value.spec.format.kind == "int"}
    zeroed = {name for name in integer if quantized[name].format.onnx_type == "INT8"}
    AttachWeights(refs, quantized, location, folder, zeroed)(model)
    needed = [spec.format.min_opset for spec in quantized.values()]
    model.graph.opset_imports[""] = max([model.graph.opset_imports[""], *needed])
    model.ir_version = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid("", model.graph.opset_imports[""])], ignore_unknown=True
    )


def save(model: ir.Model, path: Path) -> None:
    """Write the .onnx file, weights staying where they are, and check it in full.

    Raises:
        onnx.checker.ValidationError: the graph is not valid ONNX; a defect of qexport.
    """
    ir.save(model, path)
    onnx.checker.check_model(path, full_check=True)
