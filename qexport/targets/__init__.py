"""Targets: everything that qexport knows about providers, and nothing of it is anywhere else.

This module holds session options. It imports neither torch nor onnx, because the runtime uses it.
"""

from __future__ import annotations

from qexport.errors import InputError
from qexport.targets import ort_cpu, ort_cuda, tensorrt
from qexport.targets.config import OPTION_SETS, OptionSet, QuantTraits, SessionConfig
from qexport.targets.fusion import Fusion, WeightUse

PROVIDERS = {
    "cpu": ort_cpu.session_config,
    "cuda": ort_cuda.session_config,
    "tensorrt": tensorrt.session_config,
}

FUSED_FORMS = {"cpu": ort_cpu.fused_form, "cuda": ort_cuda.fused_form}
"""What a provider is expected to make of a quantised weight; TensorRT fuses by itself and does not say."""

__all__ = [
    "FUSED_FORMS",
    "OPTION_SETS",
    "PROVIDERS",
    "Fusion",
    "OptionSet",
    "QuantTraits",
    "SessionConfig",
    "WeightUse",
    "fused_forms",
    "session_config",
]


def fused_forms(use: WeightUse) -> dict[str, Fusion]:
    """What is expected of each provider."""
    return {provider: fused(use) for provider, fused in FUSED_FORMS.items()}


def session_config(provider: str, options: str, traits: QuantTraits) -> SessionConfig:
    """Session options for ``"cpu"``, ``"cuda"`` or ``"tensorrt"``, in the option set ``"exact"`` or ``"serve"``.

    Raises:
        InputError: there is no such provider or option set.
    """
    if provider not in PROVIDERS:
        raise InputError(f"unknown provider {provider!r}; one of auto, {', '.join(PROVIDERS)}")
    if options == "exact" or options == "serve":
        return PROVIDERS[provider](options, traits)
    raise InputError(f"unknown option set {options!r}; one of {', '.join(OPTION_SETS)}")
