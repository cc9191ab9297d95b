"""What can be trained beside the quantised matrices: the other floating-point parameters of the same graph.

Biases, embeddings, adaptive norms and the head stay in floating point in a bundle, so training them costs nothing when
the model runs. Which of them take part is found out, not told by names: those that a gradient reaches when the model is
taught. Under teacher forcing a codebook gets none. Two kinds are left alone although they are reached:

- what the recipe quantises, which has latent weights of its own;
- a tensor that is all zeros. Rates are relative to the root mean square of a tensor, and a floor under it would be an
  absolute number where nothing else is; nor could `verify` hold such a tensor to the checkpoint.

Matrices are stored in fp16. Training moves float32 numbers and computes with them as they are; judging, and what is
returned, use the stored ones (`stored`). The two differ by at most 2⁻¹¹ of a number, or 2⁻²⁵ where that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexport.family import GraphSpec
from qexport.quantize import MATRIX_DIMENSIONS

Named = tuple[tuple[str, ...], nn.Parameter]
"""A parameter under every name that its graph has for it."""


def candidates(graph: GraphSpec, quantised: Collection[Tensor]) -> list[Named]:
    """Parameters of a graph that could be trained beside `quantised`, in order of use."""
    without = {id(weight) for weight in quantised}
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, value in graph.parameters().items():
        if isinstance(value, nn.Parameter) and value.is_floating_point() and id(value) not in without:
            found.setdefault(id(value), ([], value))[0].append(name)
    return [(tuple(names), value) for names, value in found.values() if bool(value.detach().any())]


def reached(named: Sequence[Named], call: Callable[[], Tensor]) -> list[Named]:
    """Those that a gradient of the output of `call` reaches; these alone want gradients afterwards."""
    parameters = [parameter for _, parameter in named]
    for parameter in parameters:
        parameter.requires_grad_(True)
    output = call()
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if parameters and output.requires_grad:
        gradients = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return [one for one, gradient in zip(named, gradients, strict=True) if gradient is not None]


@contextmanager
def stored(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While entered, the parameters hold what a bundle stores of them; afterwards what they held before."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= MATRIX_DIMENSIONS]
    kept = [matrix.detach().clone() for matrix in matrices]
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(matrix.half())
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, value in zip(matrices, kept, strict=True):
                matrix.copy_(value)
