"""Seeing, and replacing, what flows into a layer, wherever in a module it is multiplied by its weight.

Every matrix product and convolution of a torch module ends in `F.linear` or `F.conv2d`, those of `nn.Linear` and
`nn.Conv2d` and those that a module calls itself (VAR's queries, keys and values, with a bias put together on the way).
So a layer is known by its weight: the parameter that the function is given. No module is changed and no hook is left.

A weight that is not given as it is, but sliced or converted first, is not recognised. Who counts on seeing every layer
asks `Interception.seen` afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qexport.errors import InputError
from qexport.family import Generator


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; `padding` as `F.conv2d` takes it."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


Visitor = Callable[[str, Tensor, Window | None], Tensor]
"""Called with layer, input and (convolutions only) window; returns what the layer is given instead."""

After = Callable[[str, Tensor], Tensor]
"""Called with layer and output, bias and all; returns what is handed on instead."""

_CONV2D_ARGUMENTS = ("bias", "stride", "padding", "dilation", "groups")


class Interception(TorchFunctionMode):
    """While it is entered, shows the input of every known layer to `visit`, and hands on what that returns.

    `after` does the same with outputs.
    """

    def __init__(self, weights: Mapping[str, Tensor], visit: Visitor, after: After | None = None) -> None:
        """Take the weight of every layer by its name; weights are told apart by identity, not by value.

        Raises:
            InputError: two layers share one weight, so that what flows into it cannot be told apart.
        """
        super().__init__()
        self._weights = dict(weights)  # keeps them alive, so that no identity is used twice
        self._layers = {id(weight): layer for layer, weight in self._weights.items()}
        if len(self._layers) < len(self._weights):
            shared = next(layer for layer, weight in weights.items() if self._layers[id(weight)] != layer)
            raise InputError(f"layers {shared!r} and {self._layers[id(weights[shared])]!r} share one weight")
        self._visit, self._after = visit, after
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch calls this in place of every one of its functions."""
        kwargs = kwargs or {}
        if func is not F.linear and func is not F.conv2d:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        layer = self._layers.get(id(given["weight"]))
        if layer is None:
            return func(*args, **kwargs)
        self.seen[layer] += 1
        window = None
        if func is F.conv2d:
            options = dict(zip(_CONV2D_ARGUMENTS, args[2:], strict=False)) | kwargs
            window = Window(**{name: options[name] for name in _CONV2D_ARGUMENTS[1:] if name in options})
        replaced = self._visit(layer, given["input"], window)
        y = func(replaced, *args[1:], **kwargs) if args else func(**{**kwargs, "input": replaced})
        return y if self._after is None else self._after(layer, y)

    def require_seen(self, layers: Iterable[str]) -> None:
        """Nothing, if all of these layers were met.

        Raises:
            InputError: one was not.
        """
        for layer in layers:
            if not self.seen[layer]:
                raise InputError(
                    f"layer {layer!r} was never reached; no F.linear or F.conv2d was given its weight as it is"
                )


def layer_weights(generator: Generator) -> dict[str, Tensor]:
    """The weight of every layer that a recipe may name, the decoder's too: the parameters themselves."""
    parameters = {graph.name: graph.parameters() for graph in generator.graphs}
    places = {**generator.layers, **generator.decoder_layers}
    return {layer: parameters[graph][name] for layer, (graph, name) in places.items()}
