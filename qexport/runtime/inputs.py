"""Checking what a caller gives to a plan: names, kinds, shapes, limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.plan import Input, Plan
from qexport.suggest import nearest


def is_per_image(spec: Input) -> bool:
    """Whether an input has one value for each image."""
    return bool(spec.shape) and spec.shape[0] == "batch"


def label_input(plan: Plan) -> Input | None:
    """The input that takes the class labels: the only required integer of shape ``("batch",)``, or None."""
    found = [i for i in plan.inputs if i.shape == ("batch",) and i.default is None and i.dtype.startswith("int")]
    return found[0] if len(found) == 1 else None


def to_arrays(plan: Plan, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Numbers, sequences and arrays as arrays, by name; what is None is left out.

    Raises:
        InputError: a name is unknown, or a value is not made of numbers.
    """
    specs = {spec.name: spec for spec in plan.inputs}
    arrays = {}
    for name, value in values.items():
        if name not in specs:
            raise InputError(
                f"unknown input {name!r}{nearest(name, specs)}; this bundle takes {', '.join(specs) or 'none'}"
            )
        if value is None:
            continue
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise InputError(f"input {name!r}: not an array of numbers ({error})") from error
        if array.dtype.kind not in "biuf" and array.size:
            raise InputError(f"input {name!r}: {value!r} is not a number that fits {specs[name].dtype}")
        arrays[name] = array
    return arrays


def batch_size(plan: Plan, arrays: Mapping[str, np.ndarray]) -> int | None:
    """Number of images that the per-image values among `arrays` stand for; None if there is none of them.

    Raises:
        InputError: they disagree.
    """
    sizes = {
        spec.name: len(arrays[spec.name])
        for spec in plan.inputs
        if is_per_image(spec) and spec.name in arrays and arrays[spec.name].ndim
    }
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise InputError(f"inputs are for different numbers of images ({counts}); give one value an image to each")
    return next(iter(sizes.values()), None)


def check_inputs(plan: Plan, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Every input of the plan in its declared dtype and shape; defaults where nothing is given.

    Args:
        plan: declares the inputs.
        arrays: from `to_arrays`; a single number fills a per-image input.
        sizes: value of each symbolic dimension.

    Raises:
        InputError: a value is missing, of the wrong shape, outside its limits, or does not fit its dtype.
    """
    return {spec.name: _checked(spec, arrays.get(spec.name), sizes) for spec in plan.inputs}


def _checked(spec: Input, given: np.ndarray | None, sizes: Mapping[str, int]) -> np.ndarray:
    if given is None:
        if spec.default is None:
            raise InputError(f"input {spec.name!r} is missing{f' ({spec.doc})' if spec.doc else ''}")
        given = np.asarray(spec.default)
    shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
    if given.shape != shape and given.ndim:
        raise InputError(f"input {spec.name!r} has shape {given.shape}; it must be {shape}")
    low, high = _range(spec.dtype)
    _refuse(spec, given, ~((given >= low) & (given <= high)), f"a number that fits {spec.dtype}")  # NaN never does
    if not spec.dtype.startswith("float"):
        _refuse(spec, given, np.mod(given, 1) != 0, "a whole number")
    low = low if spec.minimum is None else spec.minimum
    high = high if spec.maximum is None else spec.maximum
    both = f"{low:g} … {high:g}"
    limits = f"at least {low:g}" if spec.maximum is None else f"at most {high:g}" if spec.minimum is None else both
    _refuse(spec, given, (given < low) | (given > high), limits)
    return np.full(shape, given, dtype=spec.dtype)


def _range(dtype: str) -> tuple[float, float]:
    if dtype == "bool":
        return 0, 1
    if dtype.startswith("float"):
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def _refuse(spec: Input, given: np.ndarray, bad: np.ndarray, rule: str) -> None:
    if np.any(bad):
        raise InputError(f"input {spec.name!r} is {given[bad].flat[0].item()}; it must be {rule}")
