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
    """What of a bundle's quantisation the options depend on: the weight formats in use, by kind of layer.

    `weight_only` layers keep floating-point activations, `with_activations` layers quantise them as well.
    """

    weight_only: frozenset[str] = frozenset()
    with_activations: frozenset[str] = frozenset()

    @property
    def any_fp8(self) -> bool:
        """Whether any layer is in an 8-bit floating-point format."""
        return any(name.startswith("fp8") for name in self.weight_only | self.with_activations)


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
