"""What is quantised to what: granularity, the specification of a weight and of an activation, and a whole scheme.

Shape suffixes: w_OI is a weight (O outputs, I inputs), scale_RG its scales (R rows, G groups along the input). R is O
or 1, and G divides I, so that ``w_OI.reshape(R, G, -1)`` puts on its last axis the weights that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from qexport.errors import InputError
from qexport.formats import NumberFormat, get_format
from qexport.suggest import nearest

DEFAULT_GROUP_SIZE = 32

_HELPFUL_GROUP_SIZES = range(8, 257)  # what a message suggests: smaller groups cost ≥ 2 bits a weight in scales


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight."""

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape (1, 1) of the scales of a weight (rows, columns)."""
        return 1, 1

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per output row."""

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape (rows, 1) of the scales of a weight (rows, columns)."""
        return rows, 1

    def __str__(self) -> str:
        return "per channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` neighbouring weights along the input, in every row.

    Raises:
        InputError: `size` is not an integer of at least 2.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 2:
            raise InputError(f"group size {self.size!r} is not an integer of at least 2")

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape (rows, columns / size) of the scales of a weight (rows, columns).

        Raises:
            InputError: the group size does not divide the input width; the message lists sizes that do.
        """
        if columns % self.size:
            divisors = [size for size in range(2, columns + 1) if columns % size == 0]
            working = [size for size in divisors if size in _HELPFUL_GROUP_SIZES] or divisors
            sizes = ", ".join(map(str, working)) or "no size"
            raise InputError(f"groups of {self.size} do not divide an input width of {columns}; {sizes} would")
        return rows, columns // self.size

    def __str__(self) -> str:
        return f"per group of {self.size}"


Granularity = PerTensor | PerChannel | PerGroup
"""How many weights share a scale."""


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantised: into which format, and how many numbers share a scale."""

    format: NumberFormat
    granularity: Granularity

    def __str__(self) -> str:
        return f"{self.format.name} {self.granularity}"


@dataclass(frozen=True)
class Static:
    """One scale per layer, measured beforehand."""

    def __str__(self) -> str:
        return "static"


@dataclass(frozen=True)
class PerStep:
    """One scale per layer and step of the sampling plan (VAR: scale; DiT: range of timesteps), measured beforehand."""

    def __str__(self) -> str:
        return "per step"


@dataclass(frozen=True)
class PerToken:
    """One scale per token, computed while the model runs from the token's greatest magnitude."""

    def __str__(self) -> str:
        return "per token"


ActivationScales = Static | PerStep | PerToken
"""How many activations share a scale, and when it is known."""

OBSERVERS = ("minmax", "percentile", "mse")
"""What chooses a scale measured beforehand: the extremes, a quantile of them, or the least squared error."""

DEFAULT_OBSERVER = "mse"


@dataclass(frozen=True)
class ActivationSpec:
    """How the input of a layer is quantised.

    `symmetric` False gives integers a zero point, which spends the codes on the range that really occurs (after GELU
    nearly all of it is positive). `observer` chooses scales that are measured beforehand. `outputs`: what comes out of
    the layer is rounded likewise where it is a convolution (`of_output`), so that integer kernels, which hand on
    codes, can compute it; products of matrices stay as they are.

    Raises:
        InputError: an unknown observer, a zero point where there can be none (floating point, or scales that change
            from step to step or token to token), or outputs without static int8 inputs.
    """

    format: NumberFormat
    scales: ActivationScales = Static()
    symmetric: bool = True
    observer: str = DEFAULT_OBSERVER
    outputs: bool = False

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            known = ", ".join(OBSERVERS)
            raise InputError(
                f"observer {self.observer!r} is unknown{nearest(self.observer, OBSERVERS)}; one of {known}"
            )
        if not self.symmetric and (self.format.kind != "int" or not isinstance(self.scales, Static)):
            raise InputError(f"{self.format.name} activations {self.scales} have no zero point; make them symmetric")
        if self.outputs and (self.format.name != "int8" or not isinstance(self.scales, Static)):
            raise InputError(f"outputs cannot be rounded behind {self} inputs; make those int8 static, or leave it out")

    @property
    def of_output(self) -> ActivationSpec:
        """How the output is quantised where `outputs` asks for it: by one symmetric scale, with the same observer."""
        return ActivationSpec(self.format, observer=self.observer)

    def __str__(self) -> str:
        return f"{self.format.name} {self.scales}"


@dataclass(frozen=True)
class Scheme:
    """How a model's matrices and what flows into them are quantised; None keeps 16 bits or more, floating point."""

    weight: TensorSpec | None
    activation: ActivationSpec | None

    @property
    def name(self) -> str:
        """Short name, part of a bundle's directory: ``w4a16``, or ``w4a16-g128`` if the groups are not the usual."""
        weight_bits = self.weight.format.bits if self.weight else 16
        activation_bits = self.activation.format.bits if self.activation else 16
        name = f"w{weight_bits}a{activation_bits}"
        if self.weight and self.weight.format.kind == "float":
            name += "-" + self.weight.format.name.removesuffix("-e4m3")  # fp8 without more is E4M3
        if self.activation and not isinstance(self.activation.scales, Static):
            name += "-" + str(self.activation.scales).removeprefix("per ")
        if self.weight is None or self.weight.granularity == _default_granularity(weight_bits):
            return name
        match self.weight.granularity:
            case PerTensor():
                return f"{name}-tensor"
            case PerChannel():
                return f"{name}-channel"
            case PerGroup(size):
                return f"{name}-g{size}"


_WEIGHT_FORMATS = {
    "int": {8: "int8", 6: "int6", 4: "int4", 3: "int3", 2: "int2"},
    "fp8": {8: "fp8-e4m3"},
    "fp8-e5m2": {8: "fp8-e5m2"},
}


def _default_granularity(wbits: int) -> Granularity:
    # 8 bits leave an error of 1/254 of a row's maximum, below what any metric of ours resolves, so groups would only
    # cost; with fewer bits one outlier spoils its row, and groups confine it.
    return PerChannel() if wbits == 8 else PerGroup(DEFAULT_GROUP_SIZE)


_ACTIVATION_FORMATS = {
    "int": {8: "int8", 4: "int4"},
    "fp8": {8: "fp8-e4m3"},
    "fp8-e5m2": {8: "fp8-e5m2"},
}

ACTIVATION_SCALES: dict[str, ActivationScales] = {"static": Static(), "step": PerStep(), "token": PerToken()}
"""The kinds of activation scales by the name that options and recipes use."""


def preset(
    wbits: int = 4,
    abits: int = 16,
    group_size: int | None = None,
    number_format: str = "int",
    activation_scales: str = "static",
) -> Scheme:
    """The scheme for a pair of widths: w16a16, w8a16 (per channel), and w4a16, w3a16, w2a16 (groups of 32).

    `group_size` asks for other groups along the input, at 8 bits too; None is the usual granularity of that width.
    `number_format` is ``"int"``, ``"fp8"`` (E4M3) or ``"fp8-e5m2"``; the latter two are 8 bits wide. `abits` below 16
    quantises what flows into the layers too, with `activation_scales` of `ACTIVATION_SCALES`.

    Raises:
        InputError: a width that the format does not have, or a group size without anything to group.
    """
    if number_format not in _WEIGHT_FORMATS:
        raise InputError(f"--format {number_format} is not known; choose one of {', '.join(_WEIGHT_FORMATS)}")
    names = _WEIGHT_FORMATS[number_format]
    if wbits == 16 and number_format == "int":
        if group_size is not None:
            raise InputError(f"--group-size {group_size} has no meaning with --wbits 16, which keeps floating point")
        if abits != 16:
            raise InputError(f"--abits {abits} needs quantised weights; choose --wbits 8 or fewer")
        return Scheme(weight=None, activation=None)
    if wbits not in names:
        widths = ", ".join(map(str, sorted(names if number_format != "int" else {16, *names})))
        raise InputError(f"--wbits {wbits} is not available with --format {number_format}; choose one of {widths}")
    usual = _default_granularity(wbits)
    if group_size is not None and group_size < 2:
        raise InputError(f"--group-size {group_size}: at least 2 weights share a scale; leave it out for {usual}")
    granularity = usual if group_size is None else PerGroup(group_size)
    weight = TensorSpec(get_format(names[wbits]), granularity)
    return Scheme(weight, _activation(abits, number_format, activation_scales))


def _activation(abits: int, number_format: str, scales: str) -> ActivationSpec | None:
    if scales not in ACTIVATION_SCALES:
        known = ", ".join(ACTIVATION_SCALES)
        raise InputError(f"--act-scales {scales} is unknown{nearest(scales, ACTIVATION_SCALES)}; one of {known}")
    if abits == 16:
        return None
    names = _ACTIVATION_FORMATS[number_format]
    if abits not in names:
        widths = ", ".join(map(str, sorted({16, *names})))
        raise InputError(f"--abits {abits} is not available with --format {number_format}; choose one of {widths}")
    return ActivationSpec(get_format(names[abits]), ACTIVATION_SCALES[scales])
