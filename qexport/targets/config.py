"""What a target tells a session: data only, so that it can be read without any runtime installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

OptionSet = Literal["exact", "serve"]
"""``exact``: nothing is computed more coarsely than the graph says; parity runs under it. ``serve``: what the player
uses; quality and speed are both measured under it, never one from each."""

OPTION_SETS: tuple[OptionSet, ...] = ("serve", "exact")


@dataclass(frozen=True)
class QuantTraits:
    """What of a graph's quantisation the options depend on: the formats in use, by kind of layer.

    `weight_only` are the weight formats of layers that keep floating-point activations, `with_activations` those of
    layers that quantise them as well, and `activations` the formats of the latter. `per_token` tells whether any layer
    has a scale per token, `integer` whether any is a matrix with int8 weights and int8 activations of a known scale,
    which integer kernels multiply, `two_bit` whether any is one with 2-bit weights instead; `convolution` whether any
    is a convolution, `integer_convolution` whether any has int8 inputs, so that a target may compute it in integers.
    """

    weight_only: frozenset[str] = frozenset()
    with_activations: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()
    per_token: bool = False
    integer: bool = False
    two_bit: bool = False
    convolution: bool = False
    integer_convolution: bool = False

    @property
    def any_fp8(self) -> bool:
        """Whether anything is in an 8-bit floating-point format."""
        return any(name.startswith("fp8") for name in self.weight_only | self.with_activations | self.activations)

    @property
    def other_int8(self) -> bool:
        """Whether an int8 weight may have a scale per channel and no zero point: see `ort_cpu`."""
        return bool({"int8", "int6"} & self.weight_only)


@dataclass(frozen=True)
class SessionConfig:
    """How to make sessions on one provider.

    `provider` is ONNX Runtime's name, `device` the one that its IO binding uses, `entries` go to
    `SessionOptions.add_session_config_entry`.
    """

    provider: str
    device: str
    entries: Mapping[str, str] = field(default_factory=dict)
    provider_options: Mapping[str, str] = field(default_factory=dict)
