"""The quantised twin of a model in torch: the reference that a bundle must agree with.

It is built from the checkpoint, the recipe and what calibration found, and from nothing else: smoothing factors are
folded in, weights are replaced by what their codes stand for, inputs of layers go through codes where the recipe says
so, and the plan carries the scales of the step. Three variants of one model share its memory:

- `Twin.quantised`: everything, as the bundle computes it
- `Twin.unrounded`: the same weights, what flows as it is. Without the amplification of rounding (a difference
  of 1e-7 may flip a code), this one can be held to the limits of float32 sums.
- `float64_of`: a copy that computes in float64 between the roundings; how far it is from the twin is what the model
  itself makes of rounding errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qexport.family import Generator, GraphSpec
from qexport.graph.step_scales import per_step_layers, scale_port, with_step_scales
from qexport.quantize import StoredWeight, apply_stored, places_of, stored_weights
from qexport.recipe import Recipe
from qexport.reference.fake_quant import fake_quantise
from qexport.reference.fold import apply_folds
from qexport.reference.interception import Interception, Window
from qexport.reference.quantised import QuantisedModule
from qexport.solution import Activation, Solution


@dataclass(frozen=True)
class Twin:
    """See module. Where no activations are quantised, both are one."""

    quantised: Generator
    unrounded: Generator


def quantised_twin(
    generator: Generator, recipe: Recipe, solution: Solution, note: Callable[[StoredWeight], None] | None = None
) -> Twin:
    """The twin of a full-precision model, which is not changed.

    Args:
        generator: the full-precision model.
        recipe: how it is quantised.
        solution: what calibration found; codes are needed for algorithms that must see inputs.
        note: told every parameter before it is replaced; `StoredWeight.original` is the folded weight then, and valid
            only during the call.

    Raises:
        InputError: recipe or solution do not fit the model.
    """
    twin = copy.deepcopy(generator)
    apply_folds(twin, solution.smooth)

    def noting(weight: StoredWeight) -> StoredWeight:
        if note is not None:
            note(weight)
        return weight

    apply_stored(twin, map(noting, stored_weights(twin, recipe, solution)))
    return Twin(with_activations(twin, solution.activations, solution.outputs), twin)


def with_activations(
    generator: Generator, activations: Mapping[str, Activation], outputs: Mapping[str, Activation] | None = None
) -> Generator:
    """The generator with quantised inputs of layers, on the same modules, and the plan that feeds their scales.

    `outputs` says which of these layers have their outputs rounded, too.
    """
    if not activations:
        return generator
    plan, tables = with_step_scales(generator, activations)
    stepped = per_step_layers(generator, activations)
    places = places_of(generator, activations)
    graphs = []
    for spec in generator.graphs:
        mine = [layer for layer in activations if places[layer][0] == spec.name]
        if not mine:
            graphs.append(spec)
            continue
        parameters = spec.parameters()
        weights = {layer: parameters[places[layer][1]] for layer in mine}
        per_step = [layer for layer in stepped if layer in weights]
        module = QuantisedModule(
            spec.module,
            {weights[name]: activations[name] for name in mine},
            [weights[name] for name in per_step],
            {weights[name]: output for name, output in (outputs or {}).items() if name in weights},
        )
        ports = (*spec.inputs, scale_port(stepped)) if per_step else spec.inputs
        # The parts keep the names of parameters; nothing is captured from a twin.
        graphs.append(replace(spec, module=module, inputs=ports, parts=spec.all_parts))
    return replace(generator, graphs=tuple(graphs), plan=plan, tables=tables)


def float64_of(generator: Generator) -> Generator:
    """A copy that computes in float64; ports keep their types, and inputs of layers are rounded as they were."""
    copied = copy.deepcopy(generator.graphs)
    return replace(generator, graphs=tuple(_widened(spec) for spec in copied))


def _widened(spec: GraphSpec) -> GraphSpec:
    return replace(spec, module=_Float64(spec.module), parts=spec.all_parts)


class _Float64(nn.Module):
    """`module` in float64; it must be this module's own copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.double()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """float32 in and out."""
        wide = [x.double() if x.dtype == torch.float32 else x for x in inputs]
        results = self._rounding(*wide) if isinstance(self.module, QuantisedModule) else self.module(*wide)
        return tuple(x.float() if x.dtype == torch.float64 else x for x in results)

    def _rounding(self, *inputs: Tensor) -> Any:
        """As `QuantisedModule.forward`, but codes are chosen in float32, as every runtime does."""
        module = self.module
        assert isinstance(module, QuantisedModule)
        weights = {str(number): weight for number, weight in enumerate(module.activations)}
        activations = dict(zip(weights, module.activations.values(), strict=True))
        stepped = {id(weight): number for number, weight in enumerate(module.per_step)}
        *given, scales = inputs if module.per_step else (*inputs, None)

        def visit(name: str, x: Tensor, window: Window | None) -> Tensor:
            number = stepped.get(id(weights[name]))
            scale = None if scales is None or number is None else scales[number].float()
            return fake_quantise(x.float(), activations[name], scale).double()

        def after(name: str, y: Tensor) -> Tensor:
            output = module.outputs.get(id(weights[name]))
            return y if output is None else fake_quantise(y.float(), output).double()

        with Interception(weights, visit, after):
            return module.inner(*given)
