"""What a user asks for, before any layer is known: a scheme, a method, what to calibrate on, what the decoder gets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qexport.errors import InputError
from qexport.family import Generator
from qexport.methods import AUTO, Method, parse_method
from qexport.recipe import Calibration, CalibrationImages, Recipe, Rule
from qexport.scheme import Scheme, preset

DEFAULT_METHOD = parse_method("rtn")
TRAINED_FROM = parse_method("gptq")
"""Where fine-tuning starts unless somebody says otherwise: the best of what post-training quantisation finds."""

DECODER_BITS = (8, 16)


@dataclass(frozen=True)
class Budget:
    """What mixed precision may spend on the matrices of the preset: bits a weight with scales, or bytes in all.

    Raises:
        InputError: neither or both are given, or not a positive number.
    """

    bits_per_weight: float | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.size_bytes is None):
            raise InputError("--method auto needs --target-bits or --target-bytes, and only one of them")
        value = self.bits_per_weight if self.size_bytes is None else self.size_bytes
        if value is None or not value > 0:
            raise InputError(f"the budget of --method auto is {value}; it must be positive")

    def __str__(self) -> str:
        return f"{self.bits_per_weight:g}bits" if self.bits_per_weight is not None else f"{self.size_bytes}bytes"


@dataclass(frozen=True)
class Request:
    """How to quantise a model whose layers are not known yet.

    Calibration samples `samples` trajectories under `seed`; None takes what the model says of itself. `compare` names
    methods that are tried on the model; the best is taken. `budget` asks for mixed precision instead:
    then `scheme.weight` does not count. `decoder` is the scheme of the decoder's convolutions, None keeps fp16.
    `images` are calibrated on instead of the model's own samples (`qexport.calibration_data` makes them).

    Raises:
        InputError: parts that contradict each other.
    """

    scheme: Scheme
    method: Method = DEFAULT_METHOD
    samples: int | None = None
    seed: int = 0
    decoder: Scheme | None = None
    compare: tuple[Method, ...] = ()
    budget: Budget | None = None
    images: CalibrationImages | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise InputError(f"{self.samples} calibration samples; at least 1 is needed")
        if self.seed < 0:
            raise InputError(f"seed {self.seed} must be 0 or greater")
        if self.budget is not None and self.compare:
            raise InputError("--compare tries methods on one scheme; it does not go with --method auto")

    @property
    def name(self) -> str:
        """Short name, part of a bundle's directory: ``w4a16``, ``w4a16-gptq``, ``auto-4.5bits``."""
        return self._name(self.method)

    def recipe(self, generator: Generator, method: Method | None = None) -> Recipe:
        """The rules for this model: its default layers alike, then the decoder's.

        Raises:
            InputError: the decoder has nothing to quantise.
        """
        chosen = method or self.method
        weight = self.scheme.weight
        rules = [
            Rule(layers, weight, chosen.algorithm, chosen.smooth, self.scheme.activation)
            for layers in (generator.default_layers if weight else ())
        ]
        rules += self.decoder_rules(generator)
        return Recipe(self._name(chosen), tuple(rules), calibration=self.calibration(generator))

    def calibration(self, generator: Generator) -> Calibration:
        """What the model is calibrated on."""
        effort = generator.effort
        samples = self.samples or effort.calibration_samples
        return Calibration(samples, self.seed, effort.calibration_schedule, self.images)

    def decoder_rules(self, generator: Generator) -> list[Rule]:
        """The rules for the decoder; none where it keeps fp16."""
        if self.decoder is None:
            return []
        if not generator.decoder_layers:
            raise InputError(
                f"{generator.entry.name}: the decoder has no layers to quantise; leave --decoder-wbits out"
            )
        pattern = next(iter(generator.decoder_layers)).partition("/")[0] + "/*"
        return [Rule(pattern, self.decoder.weight, activation=self.decoder.activation)]

    def _name(self, method: Method) -> str:
        parts = [f"{AUTO}-{self.budget}" if self.budget else self.scheme.name]
        if method.name != DEFAULT_METHOD.name and self.budget is None:
            parts.append(method.name)
        if self.decoder is not None:
            parts.append(f"decoder-{self.decoder.name}")
        return "-".join(parts)


def decoder_scheme(wbits: int, abits: int) -> Scheme | None:
    """The scheme of a decoder's convolutions: None, w8a16 or w8a8, int8 with a scale per output channel.

    At w8a8 what comes out of the convolutions is int8, too: integer kernels compute nothing else.

    Raises:
        InputError: other widths.
    """
    if wbits not in DECODER_BITS or abits not in DECODER_BITS:
        raise InputError(f"--decoder-wbits {wbits} --decoder-abits {abits}: each must be 8 or 16")
    if wbits == 16 and abits != 16:
        raise InputError("--decoder-abits 8 needs --decoder-wbits 8")
    if wbits != 8:
        return None
    scheme = preset(wbits, abits)
    rounded = None if scheme.activation is None else replace(scheme.activation, outputs=True)
    return replace(scheme, activation=rounded)
