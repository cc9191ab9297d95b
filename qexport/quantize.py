"""From a model and a recipe to the numbers that go to disk, and back into the model as the reference of parity.

Both ways start here, so that what is exported and what it is compared with cannot drift apart: matrices the recipe
names become codes and scales, every other matrix (two dimensions or more) is stored in fp16, vectors in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qexport.algorithms import get_algorithm
from qexport.errors import InputError
from qexport.numerics.metrics import sqnr_db
from qexport.numerics.quantized import QuantizedTensor
from qexport.recipe import Recipe, Rule

if TYPE_CHECKING:
    from qexport.family import Generator

FP16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class StoredWeight:
    """One parameter as it goes to disk.

    `name` is the initialiser in `graph`; `layer` and `rule` are set for a matrix that a recipe may name. `value` is
    codes and scales (outputs, inputs), or an array: float16 (matrices), float32 (vectors), or an integer buffer.
    `original` is the model's own tensor, not copied.
    """

    graph: str
    name: str
    layer: str | None
    rule: Rule | None
    value: QuantizedTensor | np.ndarray
    original: np.ndarray

    @property
    def sqnr_db(self) -> float | None:
        """10·log10 of the power of the weights over that of their rounding error; None where nothing was quantised."""
        return sqnr_db(self.restored(), self.original) if isinstance(self.value, QuantizedTensor) else None

    def restored(self) -> np.ndarray:
        """The numbers that a runtime computes with: float32, or the integer buffer."""
        if isinstance(self.value, QuantizedTensor):
            return self.value.dequantize()
        return self.value.astype(np.float32) if self.value.dtype == np.float16 else self.value


def assign_rules(generator: Generator, recipe: Recipe) -> dict[str, Rule]:
    """The rule of every layer that is to be quantised.

    Raises:
        InputError: the recipe does not fit the model, or names an unknown algorithm.
    """
    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    shapes = {layer: _matrix_shape(parameters[graph][name].shape) for layer, (graph, name) in generator.layers.items()}
    rules = recipe.assign(generator.layers, shapes)
    for rule in rules.values():
        get_algorithm(rule.algorithm)
    return rules


def stored_weights(generator: Generator, recipe: Recipe) -> Iterator[StoredWeight]:
    """Every parameter of every graph, one at a time, in graph order.

    Raises:
        InputError: the recipe does not fit the model, or a weight is not finite or does not fit fp16.
    """
    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    rules = assign_rules(generator, recipe)
    layer_of = {place: layer for layer, place in generator.layers.items()}
    for graph, tensors in parameters.items():
        for name, tensor in tensors.items():
            layer = layer_of.get((graph, name))
            rule = rules.get(layer) if layer else None
            array = tensor.detach().numpy()
            yield StoredWeight(graph, name, layer, rule, _stored(name, array, rule), array)


def apply_stored(generator: Generator, stored: Iterable[StoredWeight]) -> None:
    """Overwrite the modules' parameters with what a runtime computes with: the quantised reference, in place."""
    import torch

    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    with torch.no_grad():
        for weight in stored:
            parameters[weight.graph][weight.name].copy_(torch.from_numpy(weight.restored()))


def _stored(name: str, array: np.ndarray, rule: Rule | None) -> QuantizedTensor | np.ndarray:
    if rule is not None and rule.weight is not None:
        return get_algorithm(rule.algorithm)(array, rule.weight, name=name)
    if not np.issubdtype(array.dtype, np.floating):
        return array
    greatest = np.maximum(-array.min(initial=0), array.max(initial=0))  # both hand on a NaN, and need no temporary
    if not np.isfinite(greatest):
        raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged")
    if array.ndim < 2:
        return array
    if greatest > FP16_MAX:
        raise InputError(f"{name}: reaches {greatest:.3g}, beyond fp16, in which matrices are stored")
    return array.astype(np.float16)


def _matrix_shape(shape: Iterable[int]) -> tuple[int, int]:
    outputs, inputs = shape
    return int(outputs), int(inputs)
