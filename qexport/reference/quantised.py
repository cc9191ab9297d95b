"""A graph's torch module with quantised activations: inputs of layers go through codes, and outputs of convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qexport.errors import InputError
from qexport.reference.fake_quant import fake_quantise
from qexport.reference.interception import Interception, Window
from qexport.scheme import PerStep
from qexport.solution import Activation


class QuantisedModule(nn.Module):
    """`inner`, whose layers see quantised inputs; their weights are what they are.

    A layer is known by its weight parameter. Those in `per_step` take their scale from the last input of `forward`,
    `act_scale` (n,) float32, element i for the i-th of them. `outputs` says how what comes out of layers is rounded.
    """

    def __init__(
        self,
        inner: nn.Module,
        activations: Mapping[Tensor, Activation],
        per_step: Sequence[Tensor] = (),
        outputs: Mapping[Tensor, Activation] | None = None,
    ) -> None:
        """Take what to do with the input of each weight's layer.

        Raises:
            InputError: a weight is no parameter of `inner`, `per_step` does not list those with scales per step, or an
                output is to be rounded of a layer whose input is not.
        """
        super().__init__()
        self.inner = inner
        self.activations = dict(activations)
        self.per_step = tuple(per_step)
        self.outputs = {id(weight): output for weight, output in (outputs or {}).items()}
        known = {id(parameter): name for name, parameter in inner.named_parameters()}
        for weight in self.activations:
            if id(weight) not in known:
                raise InputError("an activation is given for a weight that the module does not have")
        if not self.outputs.keys() <= {id(weight) for weight in self.activations}:
            raise InputError("an output is to be rounded of a layer whose input is not")
        stepped = {id(w) for w, activation in self.activations.items() if isinstance(activation.spec.scales, PerStep)}
        if stepped != {id(weight) for weight in self.per_step}:
            raise InputError(f"{len(stepped)} layers have scales per step, {len(self.per_step)} are listed")

    def forward(self, *inputs: Tensor) -> Any:
        """The inputs of `inner`, then `act_scale` where any layer has scales per step."""
        names = {str(number): weight for number, weight in enumerate(self.activations)}
        activations = dict(zip(names, self.activations.values(), strict=True))
        numbers = {id(weight): number for number, weight in enumerate(self.per_step)}
        index = {name: numbers[id(weight)] for name, weight in names.items() if id(weight) in numbers}
        *given, scales = inputs if self.per_step else (*inputs, None)

        def visit(name: str, x: Tensor, window: Window | None) -> Tensor:
            scale = None if scales is None or name not in index else scales[index[name]]
            return fake_quantise(x, activations[name], scale)

        def after(name: str, y: Tensor) -> Tensor:
            output = self.outputs.get(id(names[name]))
            return y if output is None else fake_quantise(y, output)

        with Interception(names, visit, after) as mode:
            results = self.inner(*given)
        mode.require_seen(names)
        return results
