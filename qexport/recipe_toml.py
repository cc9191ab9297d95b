"""Recipes as TOML: a file that can be read, edited and replayed."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qexport.errors import InputError
from qexport.formats import get_format
from qexport.recipe import DEFAULT_ALGORITHM, RECIPE_VERSION, Calibration, CalibrationImages, Recipe, Rule
from qexport.scheme import (
    ACTIVATION_SCALES,
    DEFAULT_OBSERVER,
    ActivationSpec,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
)
from qexport.suggest import nearest

_HEADER = """\
# How each layer was quantised. The first rule whose pattern matches a layer's name decides about it;
# a layer that no rule matches keeps its floating point. In patterns * stands for any characters, dots too.
"""
_RECIPE_KEYS = ("version", "name", "calibration", "rules")
_ACTIVATION_KEYS = ("activation", "activation_scales", "activation_symmetric", "observer", "activation_outputs")
_QUANTISE_KEYS = ("layers", "format", "granularity", "group_size", "algorithm", "smooth", *_ACTIVATION_KEYS)
_CALIBRATION_KEYS = ("samples", "seed", "schedule", "images", "images_sha256")
_KEEP_KEYS = ("layers", "keep")
_T = TypeVar("_T", str, int, bool)
_GRANULARITIES = ("tensor", "channel", "group")


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML text, to be written in UTF-8; `read_recipe` reads it back to an equal recipe."""
    lines = [_HEADER, f"version = {recipe.version}", f"name = {_quote(recipe.name)}"]
    if recipe.calibration != Calibration():
        lines += ["", *_calibration_lines(recipe.calibration)]
    for rule in recipe.rules:
        lines += ["", "[[rules]]", f"layers = {_quote(rule.layers)}"]
        if rule.weight is None:
            lines.append("keep = true  # floating point")
            continue
        lines.append(f"format = {_quote(rule.weight.format.name)}")
        match rule.weight.granularity:
            case PerTensor():
                lines.append('granularity = "tensor"  # one scale for the whole matrix')
            case PerChannel():
                lines.append('granularity = "channel"  # one scale per output')
            case PerGroup(size):
                lines.append('granularity = "group"  # one scale per group_size weights along the input')
                lines.append(f"group_size = {size}")
        lines.append(f"algorithm = {_quote(rule.algorithm)}")
        if rule.smooth is not None:
            lines.append(f"smooth = {_quote(rule.smooth)}")
        lines += _activation_lines(rule.activation)
    return "\n".join(lines) + "\n"


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        InputError: unreadable, not TOML, another version, an unknown key or a bad value; the message names the
            file, the rule by number, and the key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "not text in UTF-8"
        raise InputError(f"recipe {path}: cannot be read ({reason}); give a TOML file") from error
    try:
        return _parse(text)
    except (InputError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path}: {error}") from error


def _calibration_lines(calibration: Calibration) -> list[str]:
    images = calibration.images
    shown = "trajectories that the full-precision model samples" if images is None else "images, drawn under the seed"
    lines = [f"[calibration]  # {shown}", f"samples = {calibration.samples}", f"seed = {calibration.seed}"]
    if calibration.schedule is not None:
        lines.append(f"schedule = {_quote(calibration.schedule)}")
    if images is not None:
        lines.append(f"images = {_quote(images.name)}  # give the file itself by --calibration-data")
        if images.sha256 is not None:
            lines.append(f"images_sha256 = {_quote(images.sha256)}  # of the labels and pixels that were drawn")
    return lines


def _activation_lines(activation: ActivationSpec | None) -> list[str]:
    if activation is None:
        return []
    name = next(name for name, scales in ACTIVATION_SCALES.items() if scales == activation.scales)
    lines = [
        f"activation = {_quote(activation.format.name)}  # what flows into the layer",
        f"activation_scales = {_quote(name)}",
        f"activation_symmetric = {str(activation.symmetric).lower()}",
        f"observer = {_quote(activation.observer)}",
    ]
    return [*lines, "activation_outputs = true  # and what comes out of convolutions"] if activation.outputs else lines


def _parse(text: str) -> Recipe:
    data = tomllib.loads(text)
    _check_keys(data, _RECIPE_KEYS)
    if "version" not in data:
        raise InputError(f"key 'version' is missing; write version = {RECIPE_VERSION}")
    tables = data.get("rules", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError("key 'rules' must be tables; start each with [[rules]]")
    rules: list[Rule] = []
    calibration = _parse_calibration(data.get("calibration", {}))
    # The version first: in another version, the rules may rightly look otherwise.
    Recipe(_typed(data, "name", str), (), data["version"])
    for number, table in enumerate(tables, start=1):
        try:
            rules.append(_parse_rule(table))
        except InputError as error:
            raise InputError(f"rule {number}: {error}") from error
    return Recipe(data["name"], tuple(rules), data["version"], calibration)


def _parse_calibration(table: object) -> Calibration:
    if not isinstance(table, dict):
        raise InputError("key 'calibration' must be a table; start it with [calibration]")
    _check_keys(table, _CALIBRATION_KEYS, "[calibration]")
    default = Calibration()
    try:
        return Calibration(
            samples=_typed(table, "samples", int) if "samples" in table else default.samples,
            seed=_typed(table, "seed", int) if "seed" in table else default.seed,
            schedule=_typed(table, "schedule", str) if "schedule" in table else default.schedule,
            images=_parse_images(table),
        )
    except InputError as error:
        raise InputError(f"[calibration]: {error}") from error


def _parse_images(table: Mapping[str, Any]) -> CalibrationImages | None:
    if "images" not in table:
        if "images_sha256" in table:
            raise InputError("key 'images_sha256' has no meaning without 'images', the name of their file or folder")
        return None
    sha256 = _typed(table, "images_sha256", str) if "images_sha256" in table else None
    return CalibrationImages(_typed(table, "images", str), sha256)


def _parse_rule(table: dict[str, Any]) -> Rule:
    if "keep" in table:
        _check_keys(table, _KEEP_KEYS, "a rule that keeps floating point")
        if table["keep"] is not True:
            raise InputError(f"key 'keep' is {table['keep']!r}; it can only be true, otherwise leave it out")
        return Rule(_typed(table, "layers", str), None)
    _check_keys(table, _QUANTISE_KEYS)
    layers = _typed(table, "layers", str)
    format_name = _typed(table, "format", str)
    try:
        number_format = get_format(format_name)
    except InputError as error:
        raise InputError(f"key 'format': {error}") from error
    algorithm = _typed(table, "algorithm", str) if "algorithm" in table else DEFAULT_ALGORITHM
    smooth = _typed(table, "smooth", str) if "smooth" in table else None
    weight = TensorSpec(number_format, _parse_granularity(table))
    return Rule(layers, weight, algorithm, smooth, _parse_activation(table))


def _parse_activation(table: dict[str, Any]) -> ActivationSpec | None:
    if "activation" not in table:
        odd = next((key for key in _ACTIVATION_KEYS if key in table), None)
        if odd:
            raise InputError(f"key {odd!r} has no meaning without 'activation', the format of what flows in")
        return None
    try:
        number_format = get_format(_typed(table, "activation", str))
    except InputError as error:
        raise InputError(f"key 'activation': {error}") from error
    scales = _typed(table, "activation_scales", str) if "activation_scales" in table else "static"
    if scales not in ACTIVATION_SCALES:
        known = ", ".join(ACTIVATION_SCALES)
        raise InputError(f"key 'activation_scales' is {scales!r}{nearest(scales, ACTIVATION_SCALES)}; one of {known}")
    symmetric = _typed(table, "activation_symmetric", bool) if "activation_symmetric" in table else True
    observer = _typed(table, "observer", str) if "observer" in table else DEFAULT_OBSERVER
    outputs = _typed(table, "activation_outputs", bool) if "activation_outputs" in table else False
    return ActivationSpec(number_format, ACTIVATION_SCALES[scales], symmetric, observer, outputs)


def _parse_granularity(table: dict[str, Any]) -> Granularity:
    kind = _typed(table, "granularity", str)
    if kind in ("tensor", "channel") and "group_size" in table:
        raise InputError(f"key 'group_size' has no meaning with granularity {kind!r}")
    match kind:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "group":
            size = _typed(table, "group_size", int)
            try:
                return PerGroup(size)
            except InputError as error:
                raise InputError(f"key 'group_size': {error}") from error
    raise InputError(
        f"key 'granularity' is {kind!r}{nearest(kind, _GRANULARITIES)}; one of {', '.join(_GRANULARITIES)}"
    )


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], what: str = "") -> None:
    for key in table:
        if key not in known:
            place = f" in {what}" if what else ""
            raise InputError(f"unknown key {key!r}{place}{nearest(key, known)}; known are {', '.join(known)}")


def _typed(table: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    if key not in table:
        raise InputError(f"key {key!r} is missing")
    value = table[key]
    if type(value) is not kind:  # not isinstance: TOML's true is no integer
        wanted = {str: "a text", int: "an integer", bool: "true or false"}[kind]
        raise InputError(f"key {key!r} is {value!r}, which is not {wanted}")
    return value


def _quote(text: str) -> str:
    # JSON's escapes are a subset of those of TOML's basic strings once non-ASCII characters are left as they are.
    return json.dumps(text, ensure_ascii=False)
