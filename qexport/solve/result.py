"""What one stage came to, on disk and off: so that a run that was killed goes on where it was.

A file is written under another name and renamed when it is complete, so a stage is either there or not. The folder's
name is a hash of all that decides about the results; another checkpoint, recipe or version never finds them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qexport.errors import InputError
from qexport.family import Generator
from qexport.hidden import replacing
from qexport.numerics.quantized import QuantizedTensor
from qexport.recipe import Recipe, Rule
from qexport.recipe_toml import recipe_text
from qexport.remarks import Remark
from qexport.solution import Activation, Solution

_KEY_DIGITS = 16
_REMARKS = "remarks"  # JSON, as bytes


@dataclass
class StageResult:
    """As `Solution`, of one stage."""

    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    smooth: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    activations: dict[str, Activation] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    outputs: dict[str, Activation] = field(default_factory=dict)


def merge(generator: Generator, results: list[StageResult]) -> Solution:
    """The solution of all stages; factors in the order of the family's folds."""
    merged = StageResult()
    for result in results:
        merged.weights |= result.weights
        merged.smooth |= result.smooth
        merged.activations |= result.activations
        merged.remarks += result.remarks
        merged.outputs |= result.outputs
    smooth = {fold.name: merged.smooth[fold.name] for fold in generator.folds if fold.name in merged.smooth}
    return Solution(merged.weights, smooth, merged.activations, tuple(merged.remarks), outputs=merged.outputs)


class Workplace:
    """The results of finished stages in a folder of one model and recipe."""

    def __init__(self, work: Path, generator: Generator, recipe: Recipe) -> None:
        """Take the folder that belongs to this model and recipe below `work`, and make it.

        Raises:
            InputError: it cannot be made.
        """
        decides = {
            "qexport": version("qexport"),
            "model": generator.entry.name,
            "source": generator.entry.source,
            "checkpoints": dict(generator.checkpoint_sha256),
            "recipe": recipe_text(recipe),
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:_KEY_DIGITS]
        self.folder = work / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be made, to keep finished stages in: {error}") from error

    def load(self, number: int, rules: Mapping[str, Rule]) -> StageResult | None:
        """Result of stage `number`; None if it was not finished.

        Raises:
            InputError: the file is not what was written.
        """
        path = self._path(number)
        if not path.exists():
            return None
        try:
            return _unpack(load_file(path), rules)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: is damaged ({error}); delete it, and that stage is solved again") from error

    def save(self, number: int, result: StageResult) -> None:
        """Keep the result of a finished stage."""
        with replacing(self._path(number)) as partial:
            save_file(_pack(result), partial)

    def _path(self, number: int) -> Path:
        return self.folder / f"stage-{number:03d}.safetensors"


def _pack(result: StageResult) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for layer, weight in result.weights.items():
        tensors |= {f"codes/{layer}": weight.codes, f"scales/{layer}": weight.scales}
    tensors |= {f"smooth/{fold}": factor for fold, factor in result.smooth.items()}
    for layer, activation in result.activations.items():
        if activation.scale is not None:
            tensors[f"act_scale/{layer}"] = activation.scale
        tensors[f"act_zero_point/{layer}"] = np.array(activation.zero_point)
    tensors |= {
        f"out_scale/{layer}": output.scale for layer, output in result.outputs.items() if output.scale is not None
    }
    if result.remarks:
        text = json.dumps([astuple(remark) for remark in result.remarks])
        tensors[_REMARKS] = np.frombuffer(text.encode(), np.uint8)
    # safetensors writes the buffer as it lies, whatever the strides.
    return {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}


def _unpack(tensors: Mapping[str, np.ndarray], rules: Mapping[str, Rule]) -> StageResult:
    """In the order of the rules, as it was before: a safetensors file has its own."""
    result = StageResult(smooth={_name(key): tensor for key, tensor in tensors.items() if key.startswith("smooth/")})
    if _REMARKS in tensors:
        result.remarks = [Remark(*fields) for fields in json.loads(tensors[_REMARKS].tobytes())]
    for layer, rule in rules.items():
        if rule.weight is not None and f"codes/{layer}" in tensors:
            codes, scales = tensors[f"codes/{layer}"], tensors[f"scales/{layer}"]
            result.weights[layer] = QuantizedTensor(codes, scales, rule.weight)
        if rule.activation is not None:
            scale, zero_point = tensors.get(f"act_scale/{layer}"), int(tensors[f"act_zero_point/{layer}"])
            result.activations[layer] = Activation(rule.activation, scale, zero_point)
            if f"out_scale/{layer}" in tensors:
                result.outputs[layer] = Activation(rule.activation.of_output, tensors[f"out_scale/{layer}"])
    return result


def _name(key: str) -> str:
    return key.partition("/")[2]
