"""Recipes: which layer is quantised to what and by which algorithm, in a file that can be read, edited and replayed.

A recipe is an ordered list of rules. The first rule whose pattern matches a layer's name decides about it; a layer that
no rule matches keeps its floating point. Patterns are shell globs on the whole name, in which ``*`` also crosses dots:
``blocks.*.ffn.*`` is every feed-forward matrix of every block.

A rule that decides nothing is an error, not a no-op: it is a misspelt name, or it stands below a wider rule.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qexport.errors import InputError
from qexport.formats import get_format
from qexport.scheme import (
    ACTIVATION_SCALES,
    DEFAULT_OBSERVER,
    ActivationSpec,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    TensorSpec,
)
from qexport.suggest import nearest

if TYPE_CHECKING:
    import numpy as np

RECIPE_VERSION = 1
DEFAULT_ALGORITHM = "rtn"

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
_SHA256_DIGITS, _HEX = 64, frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Rule:
    """What happens to the layers that match the glob `layers`.

    `weight` None keeps them in floating point. `algorithm` is a name in `qexport.algorithms.ALGORITHMS`, `smooth` one
    in `qexport.algorithms.SMOOTHERS` (or None); whether they exist is checked where they are looked up, since
    algorithms lie above recipes. `activation` says how the layers' inputs are quantised; None keeps floating point.

    Raises:
        InputError: a pattern or an algorithm that is empty or not printable, or one without work to do.
    """

    layers: str
    weight: TensorSpec | None
    algorithm: str = DEFAULT_ALGORITHM
    smooth: str | None = None
    activation: ActivationSpec | None = None

    def __post_init__(self) -> None:
        _require_printable("layers", self.layers)
        _require_printable("algorithm", self.algorithm)
        if self.smooth is not None:
            _require_printable("smooth", self.smooth)
        if self.weight is None:
            if self.algorithm != DEFAULT_ALGORITHM:
                raise InputError(f"algorithm {self.algorithm!r} has nothing to do in a rule that keeps floating point")
            if self.smooth is not None or self.activation is not None:
                raise InputError("smoothing and quantised activations need a rule with quantised weights")

    def matches(self, layer: str) -> bool:
        """Whether this rule's pattern covers the layer of that name."""
        return fnmatchcase(layer, self.layers)


@dataclass(frozen=True)
class CalibrationImages:
    """The images that calibration is shown, as a recipe names them.

    Args:
        name: of the file or folder, without its path.
        sha256: of the labels and then the pixels of those that were chosen (`qexport.calibration_data`); None in a
            recipe written by hand takes whatever the file gives.
        load: (first, last) → uint8 pixels (n, H, W, 3) and int64 labels (n,) of images `first` … `last` − 1. What they
            are in this process, and no part of the recipe: one that was read from a file has None.

    Raises:
        InputError: a name that is not printable, or a hash that is none.
    """

    name: str
    sha256: str | None = None
    load: Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        _require_printable("images", self.name)
        if self.sha256 is not None and not (len(self.sha256) == _SHA256_DIGITS and set(self.sha256) <= _HEX):
            raise InputError(f"key 'images_sha256' is {self.sha256!r}; it must be {_SHA256_DIGITS} hexadecimal digits")


@dataclass(frozen=True)
class Calibration:
    """Which inputs the layers are shown: trajectories that the full-precision model samples, or given images.

    Image i of `samples` has class i modulo the number of classes and the noise of image i under `seed`; `schedule` is
    one of the plan's, None for its default. With `images`, as many of them are drawn under `seed` (see
    `qexport.calibrate.shown` for what a model is fed then).

    Raises:
        InputError: fewer than one sample, a negative seed, or a schedule that is not printable.
    """

    samples: int = 64
    seed: int = 0
    schedule: str | None = None
    images: CalibrationImages | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"{self.samples} calibration samples; at least 1 is needed")
        if self.seed < 0:
            raise InputError(f"calibration seed {self.seed} must be 0 or greater")
        if self.schedule is not None:
            _require_printable("schedule", self.schedule)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `images` and `images_sha256` only where there are any."""
        found: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "schedule": self.schedule}
        if self.images is not None:
            found |= {"images": self.images.name, "images_sha256": self.images.sha256}
        return found


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules under a name. `calibration` counts only where a rule needs to see inputs.

    Raises:
        InputError: the name is empty or not printable, or the version is not one that this qexport knows.
    """

    name: str
    rules: tuple[Rule, ...]
    version: int = RECIPE_VERSION
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        _require_printable("name", self.name)
        if type(self.version) is not int or self.version != RECIPE_VERSION:
            raise InputError(f"version is {self.version!r}; this qexport reads version {RECIPE_VERSION}")

    def assign(self, layers: Iterable[str], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Rule]:
        """The rule of every layer that is to be quantised, in the order of `layers`; others keep floating point.

        `shapes` gives (outputs, inputs) of each layer's matrix.

        Raises:
            InputError: a rule that decides about no layer, or a group size that does not divide a layer's input width.
        """
        names = list(layers)
        decisions: dict[str, int] = {}
        for layer in names:
            for number, rule in enumerate(self.rules):
                if rule.matches(layer):
                    decisions[layer] = number
                    break
        used = set(decisions.values())
        for number, rule in enumerate(self.rules):
            if number in used:
                continue
            where = f"recipe {self.name!r}, rule {number + 1}: {rule.layers!r}"
            if any(rule.matches(layer) for layer in names):
                raise InputError(f"{where} never decides: earlier rules match all of its layers; move it up")
            raise InputError(f"{where} matches none of the {len(names)} layers{nearest(rule.layers, names)}")
        assigned: dict[str, Rule] = {}
        for layer, number in decisions.items():
            rule = self.rules[number]
            if rule.weight is None:
                continue
            try:
                rule.weight.granularity.scale_shape(*shapes[layer])
            except InputError as error:
                raise InputError(f"recipe {self.name!r}, rule {number + 1}, layer {layer!r}: {error}") from error
            assigned[layer] = rule
        return assigned

    def to_toml(self) -> str:
        """The recipe as TOML text, to be written in UTF-8; `from_toml` reads it back to an equal recipe."""
        lines = [_HEADER, f"version = {self.version}", f"name = {_quote(self.name)}"]
        if self.calibration != Calibration():
            lines += ["", *_calibration_lines(self.calibration)]
        for rule in self.rules:
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

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
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


def recipe_for(
    scheme: Scheme,
    default_layers: Iterable[str],
    name: str,
    algorithm: str = DEFAULT_ALGORITHM,
    smooth: str | None = None,
    calibration: Calibration | None = None,
) -> Recipe:
    """The recipe of a preset: every pattern of `default_layers` quantised alike."""
    rules = [Rule(layers, scheme.weight, algorithm, smooth, scheme.activation) for layers in default_layers]
    return Recipe(name, tuple(rules) if scheme.weight else (), calibration=calibration or Calibration())


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


def _require_printable(key: str, text: str) -> None:
    # Whatever is printable survives TOML's quoting unchanged, and cannot forge lines in a message or a log.
    if not text or not text.isprintable():
        raise InputError(f"key {key!r} is {text!r}; it must be a non-empty line of printable text")


def _quote(text: str) -> str:
    # JSON's escapes are a subset of those of TOML's basic strings once non-ASCII characters are left as they are.
    return json.dumps(text, ensure_ascii=False)
