"""Recipes: which layer is quantised to what and by which algorithm; `qexport.recipe_toml` is their file.

A recipe is an ordered list of rules. The first rule whose pattern matches a layer's name decides about it; a layer that
no rule matches keeps its floating point. Patterns are shell globs on the whole name, in which ``*`` also crosses dots:
``blocks.*.ffn.*`` is every feed-forward matrix of every block.

A rule that decides nothing is an error, not a no-op: it is a misspelt name, or it stands below a wider rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from qexport.errors import InputError
from qexport.scheme import ActivationSpec, Scheme, TensorSpec
from qexport.suggest import nearest

if TYPE_CHECKING:
    import numpy as np

RECIPE_VERSION = 1
DEFAULT_ALGORITHM = "rtn"

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


def _require_printable(key: str, text: str) -> None:
    # Whatever is printable survives TOML's quoting unchanged, and cannot forge lines in a message or a log.
    if not text or not text.isprintable():
        raise InputError(f"key {key!r} is {text!r}; it must be a non-empty line of printable text")
