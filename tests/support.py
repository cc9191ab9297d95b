"""What tests of the model families share: fixtures of the originals, bundled checkpoints, distances."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import qexport_models
import torch
from safetensors.torch import load_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = Path(next(iter(qexport_models.__path__))) / "checkpoints"


def relative_l2(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; shapes must agree, so that nothing broadcasts."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def spec(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def state_of(fixture: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("sd."): value for key, value in fixture.items() if key.startswith("sd.")}


def checkpoint(name: str) -> dict[str, Tensor]:
    return load_file(CHECKPOINTS / f"{name}.safetensors")


def published_lists(family: str) -> dict[str, dict[str, Any]]:
    """Model → config, parameters (a count), shapes (key → shape)."""
    return json.loads(gzip.decompress((FIXTURES / "keys" / f"{family}.json.gz").read_bytes()))


def on_meta(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
