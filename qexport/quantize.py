"""From a model and a recipe to the numbers that go to disk, and back into the model as the reference of parity.

Both ways start here, so that what is exported and what it is compared with cannot drift apart: matrices the recipe
names become codes and scales, every other matrix (two dimensions or more) is stored in fp16, vectors in fp32. A
convolution (outputs, inputs, height, width) is quantised as the matrix (outputs, inputs · height · width).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qexport.algorithms import get_algorithm
from qexport.errors import InputError
from qexport.numerics.metrics import sqnr_db
from qexport.numerics.quantized import QuantizedTensor
from qexport.recipe import Recipe, Rule
from qexport.scheme import ActivationSpec, PerGroup, PerStep, PerToken, TensorSpec
from qexport.solution import Solution

if TYPE_CHECKING:
    from qexport.family import Generator

EXPORTED_INPUTS = ("int8", "int4", "fp8-e4m3", "fp8-e5m2")
"""Formats of layers' inputs that a bundle can hold. QuantizeLinear saturates where its type ends, so a format narrower
than its container is not what it does; it knows 2-bit integers from opset 25 on only, and no kernel takes them."""

FP16_MAX = float(np.finfo(np.float16).max)

MATRIX_DIMENSIONS = 2
"""Floating-point tensors of at least so many dimensions are stored in fp16."""

FEWEST_OUTPUTS = 16
"""Channels from which on the output of a convolution is rounded. The one that makes a picture has three: its work is
little, and its codes would be the picture's levels."""


@dataclass(frozen=True)
class StoredWeight:
    """One parameter as it goes to disk.

    `name` is the initialiser in `graph`; `layer` and `rule` are set for a matrix that a recipe may name. `value` is
    codes and scales (outputs, inputs), or an array: float16 (matrices), float32 (vectors), or an integer buffer.
    `original` is the model's own tensor, not copied. `smoothed` tells whether a factor was folded into its columns,
    `trained` whether an array is the solution's and not the model's own.
    """

    graph: str
    name: str
    layer: str | None
    rule: Rule | None
    value: QuantizedTensor | np.ndarray
    original: np.ndarray
    smoothed: bool = False
    trained: bool = False

    @property
    def sqnr_db(self) -> float | None:
        """10·log10 of the power of the weights over that of their difference from the model's own.

        None where nothing was quantised or trained.
        """
        changed = self.trained or isinstance(self.value, QuantizedTensor)
        return sqnr_db(self.restored(), self.original) if changed else None

    def restored(self) -> np.ndarray:
        """The numbers that a runtime computes with: float32, or the integer buffer."""
        if isinstance(self.value, QuantizedTensor):
            return self.value.dequantize().reshape(self.original.shape)
        return self.value.astype(np.float32) if self.value.dtype == np.float16 else self.value


def assign_rules(generator: Generator, recipe: Recipe) -> dict[str, Rule]:
    """The rule of every layer that is to be quantised.

    Layers of the decoder are named ``decode/decoder.conv_in``, and only a pattern with a slash speaks of them: ``*``
    alone is every layer of the generator.

    Raises:
        InputError: the recipe does not fit the model, or names an unknown algorithm.
    """
    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    places = {**generator.layers, **_decoder_layers_of(generator, recipe)}
    shapes = {layer: tuple(parameters[graph][name].shape) for layer, (graph, name) in places.items()}
    rules = recipe.assign(places, {layer: _matrix_shape(shape) for layer, shape in shapes.items()})
    for layer, rule in rules.items():
        get_algorithm(rule.algorithm)
        reason = _unfit(generator, places[layer][0], shapes[layer], rule)
        if reason:
            raise InputError(f"recipe {recipe.name!r}, layer {layer!r}: {reason}")
    return rules


def places_of(generator: Generator, layers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(graph, initialiser name) of each of these layers, whether of the generator or of its decoder."""
    known = {**generator.decoder_layers, **generator.layers}
    return {layer: known[layer] for layer in layers}


def output_specs(generator: Generator, rules: Mapping[str, Rule]) -> dict[str, ActivationSpec]:
    """How the outputs of layers are to be rounded: those of convolutions whose rule asks for it (`FEWEST_OUTPUTS`)."""
    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    found = {}
    for layer, (graph, name) in places_of(generator, rules).items():
        spec, shape = rules[layer].activation, parameters[graph][name].shape
        if rounds_output(spec, shape):
            assert spec is not None
            found[layer] = spec.of_output
    return found


def rounds_output(spec: ActivationSpec | None, shape: Sequence[int]) -> bool:
    """Whether a layer with a weight of this shape has its output rounded."""
    return spec is not None and spec.outputs and len(shape) == 4 and shape[0] >= FEWEST_OUTPUTS


def require_exportable(rules: Mapping[str, Rule]) -> None:
    """Refuse what no bundle can hold, or could hold but not run: such rules are for study, in torch.

    Raises:
        InputError: naming the first layer with such a rule, and what to choose instead.
    """
    for layer, rule in rules.items():
        if reason := why_not_exportable(rule.weight, rule.activation):
            raise InputError(f"{layer}: {reason}")


def why_not_exportable(weight: TensorSpec | None, activation: ActivationSpec | None) -> str:
    """Why a layer quantised so cannot be exported, and what to choose instead; empty if it can.

    INT8 weights in groups behind int8 inputs of a known scale: ONNX Runtime 1.31.1 fuses them to MatMulIntegerToFloat,
    whose kernel takes one scale a column and fails when it runs (`docs/formats.md`, `benchmarks/format_support.py`).
    """
    if weight is not None and weight.format.onnx_type is None:
        return f"{weight.format.name} is for study only, ONNX has no such type; choose another"
    if activation is None:
        return ""
    number_format = activation.format
    if number_format.name not in EXPORTED_INPUTS:
        return (
            f"activations in {number_format.name} cannot be exported, QuantizeLinear has no such type; "
            f"choose {', '.join(EXPORTED_INPUTS[:-1])} or {EXPORTED_INPUTS[-1]}"
        )
    if weight is None or weight.format.onnx_type != "INT8" or not isinstance(weight.granularity, PerGroup):
        return ""
    if number_format.name == "int8" and not isinstance(activation.scales, PerToken):
        return (
            f"{weight.format.name} weights in groups do not run behind int8 inputs whose scales are "
            f"{activation.scales}: ONNX Runtime's kernel takes a scale for each whole row; leave --group-size out "
            "(granularity 'channel'), or choose --act-scales token"
        )
    return ""


def stored_weights(generator: Generator, recipe: Recipe, solution: Solution | None = None) -> Iterator[StoredWeight]:
    """Every parameter of every graph, one at a time, in graph order.

    Codes, and parameters that were trained in floating point, are taken from `solution` where it has them; codes are
    made by the rule's algorithm elsewhere. Where `solution` has smoothing factors, they must have been folded into
    `generator` before.

    Raises:
        InputError: the recipe does not fit the model, a weight is not finite or does not fit fp16, or the codes or
            parameters of the solution are of another weight.
    """
    solution = solution or Solution()
    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    rules = assign_rules(generator, recipe)
    unknown = solution.floats.keys() - {f"{graph}/{name}" for graph, tensors in parameters.items() for name in tensors}
    if unknown:
        raise InputError(f"{min(unknown)}: was trained, and {generator.entry.name} has no such parameter")
    layer_of = {place: layer for layer, place in generator.layers.items()}
    layer_of |= {place: layer for layer, place in places_of(generator, rules).items()}
    smoothed = {layer for fold in generator.folds if fold.name in solution.smooth for layer in fold.layers}
    for graph, tensors in parameters.items():
        for name, tensor in tensors.items():
            layer = layer_of.get((graph, name))
            rule = rules.get(layer) if layer else None
            array = tensor.detach().cpu().numpy()
            solved = solution.weights.get(layer) if layer else None
            trained = solution.floats.get(f"{graph}/{name}")
            value = _stored(name, array, rule, solved, trained)
            yield StoredWeight(graph, name, layer, rule, value, array, layer in smoothed, trained is not None)


def as_stored(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter that is not quantised as it goes to disk: matrices in float16, all else as it is.

    Raises:
        InputError: it is not finite, or does not fit fp16.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return array
    greatest = np.maximum(-array.min(initial=0), array.max(initial=0))  # both hand on a NaN, and need no temporary
    if not np.isfinite(greatest):
        raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
    if array.ndim < MATRIX_DIMENSIONS:
        return array
    if greatest > FP16_MAX:
        raise InputError(f"{name}: reaches {greatest:.3g}, beyond fp16, in which matrices are stored")
    return array.astype(np.float16)


def apply_stored(generator: Generator, stored: Iterable[StoredWeight]) -> None:
    """Overwrite the modules' parameters with what a runtime computes with: the quantised reference, in place."""
    import torch

    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    with torch.no_grad():
        for weight in stored:
            parameters[weight.graph][weight.name].copy_(torch.from_numpy(weight.restored()))


def _decoder_layers_of(generator: Generator, recipe: Recipe) -> dict[str, tuple[str, str]]:
    """The decoder's layers that the recipe speaks of; all of them where it speaks of one that there is not."""
    patterns = [rule for rule in recipe.rules if "/" in rule.layers]
    if not patterns:
        return {}
    known = generator.decoder_layers
    if not all(any(rule.matches(layer) for layer in known) for rule in patterns):
        return known
    return {layer: place for layer, place in known.items() if any(rule.matches(layer) for rule in patterns)}


def _unfit(generator: Generator, graph: str, shape: Sequence[int], rule: Rule) -> str:
    """Why a rule cannot be carried out on a layer with a weight of this shape; empty if it can."""
    if len(shape) == 4:
        if rule.weight is not None and isinstance(rule.weight.granularity, PerGroup):
            return "a convolution has scales per channel or per tensor; set granularity"
        if rule.activation is not None and isinstance(rule.activation.scales, PerToken):
            return "a convolution's input has no tokens; make activation_scales static"
    if rule.activation is not None and isinstance(rule.activation.scales, PerStep):
        steps = generator.steps
        if steps is None or steps.graph != graph:
            return f"{generator.entry.name} has no steps in graph {graph!r}; make activation_scales static or token"
    return ""


def _stored(
    name: str, array: np.ndarray, rule: Rule | None, solved: QuantizedTensor | None, trained: np.ndarray | None
) -> QuantizedTensor | np.ndarray:
    if rule is not None and rule.weight is not None:
        if trained is not None:
            raise InputError(f"{name}: was trained in floating point, and the recipe quantises it")
        shape = _matrix_shape(array.shape)
        if solved is None:
            return get_algorithm(rule.algorithm)(array.reshape(shape), rule.weight, name=name)
        if solved.spec != rule.weight or solved.codes.shape != shape:
            raise InputError(f"{name}: was solved as {solved.spec} {solved.codes.shape}, not {rule.weight} {shape}")
        return solved
    if trained is None:
        return as_stored(name, array)
    wanted = np.dtype(np.float16) if array.ndim >= MATRIX_DIMENSIONS else array.dtype
    if (trained.shape, trained.dtype) != (array.shape, wanted):
        found = f"{trained.dtype} {trained.shape}"
        raise InputError(f"{name}: was trained as {found}, and is stored as {wanted} {array.shape}")
    return as_stored(name, trained)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    return int(shape[0]), math.prod(map(int, shape[1:]))
