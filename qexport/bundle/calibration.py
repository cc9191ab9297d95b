"""``calibration.safetensors``: what calibration found out, without which the quantised model cannot be rebuilt.

    smooth/<fold>             (I,) float32        factors that were folded into the weights
    act_scale/<layer>         () or (S,) float32  scale of a layer's input, or one for each of S steps
    act_zero_point/<layer>    () int32            its zero point, where the recipe gives it one
    out_scale/<layer>         () float32          scale of a convolution's output, where that is rounded

Scales per token are computed while the model runs and are not here. The codes lie in the weight file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qexport.errors import BundleError, InputError
from qexport.recipe import Rule
from qexport.scheme import ActivationSpec, PerToken
from qexport.solution import Activation, Solution

CALIBRATION = "calibration.safetensors"

_SMOOTH, _SCALE, _ZERO_POINT, _OUTPUT = "smooth/", "act_scale/", "act_zero_point/", "out_scale/"


def calibration_bytes(solution: Solution) -> bytes:
    """The file's content; the same solution gives the same bytes. Empty where nothing was calibrated."""
    tensors: dict[str, np.ndarray] = {_SMOOTH + name: factor for name, factor in solution.smooth.items()}
    for layer, activation in solution.activations.items():
        if activation.scale is not None:
            tensors[_SCALE + layer] = activation.scale
            if not activation.spec.symmetric:
                tensors[_ZERO_POINT + layer] = np.array(activation.zero_point, np.int32)
    tensors |= {_OUTPUT + layer: output.scale for layer, output in solution.outputs.items() if output.scale is not None}
    return save(dict(sorted(tensors.items()))) if tensors else b""


def read_calibration(
    root: Path, rules: Mapping[str, Rule], outputs: Mapping[str, ActivationSpec] | None = None
) -> Solution:
    """The solution of the bundle in the folder `root`, without codes and remarks.

    Args:
        root: the bundle; its files have been checked.
        rules: the rule of every quantised layer, from the bundle's recipe.
        outputs: the layers whose outputs are rounded by it (`qexport.quantize.output_specs`).

    Raises:
        BundleError: the file is damaged, or lacks what the recipe needs, or holds more.
    """
    path = root / CALIBRATION
    tensors = _load(path) if path.exists() else {}
    smooth = {name.removeprefix(_SMOOTH): tensors.pop(name) for name in list(tensors) if name.startswith(_SMOOTH)}
    if any(factor.dtype != np.float32 or factor.ndim != 1 for factor in smooth.values()):
        raise BundleError(f"{path}: a smoothing factor is not float32 (I,); quantise again")
    activations: dict[str, Activation] = {}
    for layer, rule in rules.items():
        spec = rule.activation
        if spec is None:
            continue
        scale, zero_point = None, np.array(0, np.int32)
        if not isinstance(spec.scales, PerToken):
            scale = tensors.pop(_SCALE + layer, None)
            if scale is None:
                raise BundleError(f"{path}: has no activation scale of {layer!r}; quantise again")
        if not spec.symmetric:
            zero_point = tensors.pop(_ZERO_POINT + layer, zero_point)
        if zero_point.dtype != np.int32 or zero_point.shape != ():
            raise BundleError(f"{path}: the zero point of {layer!r} is not one int32; quantise again")
        try:
            activations[layer] = Activation(spec, scale, int(zero_point))
        except InputError as error:
            raise BundleError(f"{path}: {layer}: {error}") from error
    made: dict[str, Activation] = {}
    for layer, spec in (outputs or {}).items():
        scale = tensors.pop(_OUTPUT + layer, None)
        if scale is None:
            raise BundleError(f"{path}: has no scale of the output of {layer!r}; quantise again")
        try:
            made[layer] = Activation(spec, scale)
        except InputError as error:
            raise BundleError(f"{path}: {layer}: its output's {error}") from error
    if tensors:
        raise BundleError(f"{path}: holds {next(iter(tensors))!r}, which the recipe has no use for; quantise again")
    return Solution(smooth=smooth, activations=activations, outputs=made)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: cannot be read ({type(error).__name__}); quantise again") from error
