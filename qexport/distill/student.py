"""The quantised student: a copy of the model whose matrices are rounded, with a gradient, on their way to `F.linear`.

No module is changed. The copy's own parameters are the latent weights that are trained; while the student computes, a
`TorchFunctionMode` recognises a weight by its identity, as `qexport.reference.Interception` does, and hands on its
rounded value, and the rounded input where activations are quantised. Everything that is not quantised holds what a
bundle stores (matrices in fp16), so the student is the exported model to the last bit of every weight; what of it is
trained as well (`qexport.distill.rest`) does so while the student is judged.

The latent weights start at the full-precision ones where those round to the codes that post-training quantisation
chose, and in the middle of the code's cell elsewhere: what GPTQ found is where training starts.

Shape suffixes: O outputs, I inputs, R rows of scales, G groups along the input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qexport.distill import processes, rest
from qexport.distill.rounding import Rounder, rounded_activation, stored_scale
from qexport.errors import InputError
from qexport.family import Generator
from qexport.numerics.affine import quantize_full
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import as_stored, places_of, stored_weights
from qexport.recipe import Recipe
from qexport.reference.fake_quant import round_to
from qexport.scheme import PerStep
from qexport.solution import LEAST_TOKEN_SCALE, Activation, Solution

Predict = Callable[..., Tensor]
"""The task's call of a model, with gradients: tensors of a batch → logits, or a denoiser's output."""

PlaceSteps = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]
"""(scales of the steps (S,), input of a layer, tensors of the batch) → scale that broadcasts to the input."""


@dataclass(frozen=True, eq=False)
class Finished:
    """What a bundle holds of a student: codes, scales and activations by layer, and what is trained beside by
    ``graph/name`` (as in `Solution`).
    """

    weights: dict[str, QuantizedTensor]
    activations: dict[str, Activation]
    floats: dict[str, np.ndarray]


class Overlay(TorchFunctionMode):
    """While entered, `F.linear` with a weight in `weights` gets its replacement, and its input through `inputs`."""

    def __init__(self, weights: Mapping[int, Tensor], inputs: Mapping[int, Callable[[Tensor], Tensor]]) -> None:
        """Both are keyed by the identity of the weight, which the caller keeps alive."""
        super().__init__()
        self._weights, self._inputs = weights, inputs
        self.seen: set[int] = set()

    @property
    def weights(self) -> list[Tensor]:
        """The replacements."""
        return list(self._weights.values())

    def again(self) -> Overlay:
        """The same once more, for a stretch that is computed a second time in the backward pass."""
        return Overlay(self._weights, self._inputs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch calls this in place of every one of its functions."""
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        key = id(given["weight"])
        if key not in self._weights:
            return func(*args, **kwargs)
        self.seen.add(key)
        x = self._inputs[key](given["input"]) if key in self._inputs else given["input"]
        return func(x, self._weights[key], given.get("bias"))


class Student(nn.Module):
    """See module. Its parameters are what is trained; `forward` takes the tensors of a batch."""

    def __init__(
        self,
        generator: Generator,
        recipe: Recipe,
        solution: Solution,
        predict: Callable[[Generator], Predict],
        place_steps: PlaceSteps,
        *,
        learn_scales: bool = True,
        learn_activation_scales: bool = True,
    ) -> None:
        """Copy `generator`, which is full precision with the solution's smoothing folded in, and quantise the copy.

        The student lies where the generator does.

        Raises:
            InputError: the recipe quantises no matrix of the graph that is trained.
        """
        super().__init__()
        self._generator = copy.deepcopy(generator)
        starts = _store(generator, self._generator, recipe, solution)
        if not starts:
            raise InputError(f"recipe {recipe.name!r} quantises no matrix of {generator.entry.name}: nothing to train")
        self.layers = tuple(starts)
        self.specs = tuple(start.spec for start in starts.values())
        weights = layer_parameters(self._generator, self.layers)
        originals = layer_parameters(generator, self.layers)
        scales, activations, self.errors = {}, [], {}
        for layer, start in starts.items():
            latent = _latent(originals[layer].detach(), start)
            with torch.no_grad():
                weights[layer].copy_(latent)
            self.errors[layer] = _relative_error(originals[layer].detach(), start)
            held = torch.tensor(start.scales.astype(np.float32), device=latent.device)
            scales[layer] = nn.Parameter(held, requires_grad=learn_scales)
        for parameter in _parameters(self._generator):
            parameter.requires_grad_(False)
        for layer in self.layers:
            weights[layer].requires_grad_(True)
        self._weights = [weights[layer] for layer in self.layers]  # what F.linear is given; not parameters of this
        self.rounders = nn.ModuleList(
            Rounder(weights[layer], scales[layer], start.spec.format) for layer, start in starts.items()
        )
        self._activations = {
            layer: solution.activations[layer] for layer in self.layers if layer in solution.activations
        }
        self.scaled = tuple(layer for layer, found in self._activations.items() if found.scale is not None)
        for layer in self.scaled:
            scale = self._activations[layer].scale
            assert scale is not None
            held = torch.from_numpy(scale.copy()).to(self._weights[0].device)
            activations.append(nn.Parameter(held, requires_grad=learn_activation_scales))
        self.activation_scales = nn.ParameterList(activations)
        self.rest = nn.ParameterList()
        self._rest_names: list[tuple[str, ...]] = []
        self._predict, self._place_steps = predict(self._generator), place_steps
        self._current: Overlay | None = None

    @property
    def latents(self) -> list[nn.Parameter]:
        """Of each layer; of several processes' divided student the own parts, as `DTensor`."""
        return [rounder.latent for rounder in self._rounders]

    @property
    def scales(self) -> list[nn.Parameter]:
        """Of each layer, likewise."""
        return [rounder.scale for rounder in self._rounders]

    @property
    def _rounders(self) -> list[Rounder]:
        return [rounder for rounder in self.rounders if isinstance(rounder, Rounder)]

    def train_rest(self, *sample: Tensor) -> None:
        """Train also what is not quantised, as far as a gradient reaches it (`qexport.distill.rest`).

        `sample` is a batch of one. To be called before an optimiser is made, and once.
        """
        graph = self._generator.graph(trained_graph(self._generator))
        found = rest.reached(rest.candidates(graph, self._weights), lambda: self(*sample))
        self._rest_names = [tuple(f"{graph.name}/{name}" for name in names) for names, _ in found]
        self.rest.extend(parameter for _, parameter in found)

    def stored(self) -> AbstractContextManager[None]:
        """While entered, the student computes with what a bundle stores also of what is trained beside."""
        return rest.stored(self.rest)

    def divide(self) -> None:
        """Leave each process a part of the latent weights and their scales; what is trained beside stays whole.

        The model's own weights, which nothing reads, are let go.
        """
        processes.divide(self._rounders)
        for weight in self._weights:
            weight.requires_grad_(False).data = torch.empty(0, device=weight.device)

    @property
    def rounded(self) -> list[Tensor]:
        """The rounded weights (O, I) of the latest forward pass; none before the first."""
        return self._current.weights if self._current is not None else []

    @property
    def activations(self) -> dict[str, Activation]:
        """Quantised inputs where training started, by layer."""
        return dict(self._activations)

    @property
    def generator(self) -> Generator:
        """The copy, whose quantised matrices hold latent weights."""
        return self._generator

    def forward(self, *batch: Tensor) -> Tensor:
        """Logits, or a denoiser's output, of the quantised model."""
        self._current = self.overlay(batch)
        with self._current as overlay:
            result = self._predict(*batch)
        if len(overlay.seen) < len(self.layers):
            unseen = next(n for n, w in zip(self.layers, self._weights, strict=True) if id(w) not in overlay.seen)
            raise InputError(f"layer {unseen!r} was never reached; no F.linear was given its weight as it is")
        return result

    def again(self) -> Overlay:
        """The overlay of the latest forward pass once more, for what is computed again in the backward pass."""
        assert self._current is not None
        return self._current.again()

    def state(self) -> dict[str, Tensor]:
        """What is trained, in no more than this: the rest of the model is not part of a checkpoint.

        All processes must ask; the first is answered, on the CPU.
        """
        return {name: processes.gathered(value.detach()) for name, value in self.named_parameters()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            InputError: it is of another student.
        """
        mine = dict(self.named_parameters())
        if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in state.items()}:
            raise InputError("the checkpoint is of another student; delete it to start again")
        for name, value in mine.items():
            processes.set_part(value, state[name])

    def overlay(self, batch: tuple[Tensor, ...]) -> Overlay:
        """The mode under which the copy computes as the quantised model."""
        weights = {id(weight): rounder() for weight, rounder in zip(self._weights, self._rounders, strict=True)}
        by_layer = dict(zip(self.scaled, self.activation_scales, strict=True))
        inputs = {
            id(weight): self._rounding(self._activations[layer], by_layer.get(layer), batch)
            for layer, weight in zip(self.layers, self._weights, strict=True)
            if layer in self._activations
        }
        return Overlay(weights, inputs)

    def _rounding(
        self, activation: Activation, scale: Tensor | None, batch: tuple[Tensor, ...]
    ) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            placed = scale
            if scale is not None and isinstance(activation.spec.scales, PerStep):
                placed = self._place_steps(scale, x, batch)
            return rounded_activation(x, activation, placed)

        return apply

    @torch.no_grad()
    def finish(self) -> Finished:
        """Codes and scales of every layer, its activation where it has one, and what is trained beside.

        It is what the forward pass computes with while `stored` is entered.

        All processes of a divided student must ask.

        Raises:
            InputError: a weight is not finite.
        """
        weights = {}
        for layer, latent, scale, spec in zip(self.layers, self.latents, self.scales, self.specs, strict=True):
            stored = stored_scale(processes.whole(scale)).cpu().numpy().astype(np.float16)
            codes = quantize_full(processes.whole(latent).cpu().numpy(), stored, spec, name=layer)
            weights[layer] = QuantizedTensor(codes, stored, spec)
        activations = dict(self._activations)
        for layer, scale in zip(self.scaled, self.activation_scales, strict=True):
            found = activations[layer]
            held = scale.clamp_min(LEAST_TOKEN_SCALE).cpu().numpy().copy()
            activations[layer] = Activation(found.spec, held, found.zero_point)
        floats = {
            name: as_stored(name, parameter.detach().cpu().numpy().copy())
            for names, parameter in zip(self._rest_names, self.rest, strict=True)
            for name in names
        }
        return Finished(weights, activations, floats)


def layer_parameters(generator: Generator, layers: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The weight of each layer: the parameter itself."""
    found = {}
    for layer, (graph, name) in places_of(generator, layers).items():
        parameter = generator.graph(graph).parameters()[name]
        assert isinstance(parameter, nn.Parameter)
        found[layer] = parameter
    return found


def trained_graph(generator: Generator) -> str:
    """The graph whose matrices can be trained: the one that draws tokens or denoises, not the decoder.

    Raises:
        InputError: the model does neither.
    """
    if generator.draw is not None and generator.quality is not None:
        return generator.draw.graph
    if generator.denoise is not None:
        return generator.denoise.graph
    raise InputError(f"{generator.entry.name} neither offers teacher forcing nor denoises; it cannot be fine-tuned")


def _store(full: Generator, target: Generator, recipe: Recipe, solution: Solution) -> dict[str, QuantizedTensor]:
    """Write what a bundle holds into `target`, and return the codes where training starts, by layer."""
    graph = trained_graph(full)
    parameters = {spec.name: spec.parameters() for spec in target.graphs}
    starts = {}
    for weight in stored_weights(full, recipe, solution):
        if isinstance(weight.value, QuantizedTensor) and weight.graph == graph and weight.layer is not None:
            starts[weight.layer] = weight.value
            continue
        with torch.no_grad():
            parameters[weight.graph][weight.name].copy_(torch.from_numpy(weight.restored()))
    return starts


def _latent(w_OI: Tensor, start: QuantizedTensor) -> Tensor:
    """w where it rounds to the codes of `start` by itself, and what the code stands for where it does not.

    The nearest number that rounds to the code would be at the very edge of its cell, and the first steps would throw
    most of what GPTQ found to the other side: on var-c10-d2 at 2 bits, KL 0.070 became 0.37 in ten steps and was 0.23
    after thirty, where from the middle of the cells it fell to 0.065 and 0.045. To start all weights there, or half
    way, is worse (0.057, 0.049): what rounding takes from a weight says which way it leans.
    """
    scale = torch.from_numpy(start.scales.astype(np.float32)).to(w_OI.device)[..., None]
    blocks = w_OI.reshape(*start.scales.shape, -1)
    held = torch.from_numpy(start.dequantize()).to(w_OI.device).reshape(blocks.shape)
    rounds_to_it = round_to(blocks / scale, start.spec.format) * scale == held
    return torch.where(rounds_to_it, blocks, held).reshape(w_OI.shape)


def _relative_error(w_OI: Tensor, start: QuantizedTensor) -> float:
    """‖Q(w) − w‖ / ‖w‖; 0 for a matrix of zeros."""
    held = torch.from_numpy(start.dequantize()).to(w_OI.device)
    return float((held - w_OI).norm() / w_OI.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _parameters(generator: Generator) -> list[nn.Parameter]:
    return [
        value for spec in generator.graphs for value in spec.parameters().values() if isinstance(value, nn.Parameter)
    ]
