"""Ink: a family of image generators that qexport has never heard of.

One graph, called once: noise z and a class label → an 8 × 8 picture. Legend: B images, Z noise, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from qexport_models.random_weights import build_random
from qexport_models.strict_load import build_strict
from torch import Tensor, nn

from qexport.checkpoint import open_checkpoint, sha256
from qexport.errors import CheckpointError
from qexport.family import Family, Generator, GraphSpec, ModelEntry, Port, random_entry
from qexport.plan import Call, Input, Noise, Plan, State

CLASSES, NOISE, WIDTH, SIDE = 5, 16, 64, 8


class Block(nn.Module):
    """x + fc2(gelu(fc1(norm(x))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) → (B, D)."""
        return x_BD + self.fc2(nn.functional.gelu(self.fc1(self.norm(x_BD)), approximate="tanh"))


class Ink(nn.Module):
    """The model, as the exporter sees it: tensors in, a tuple of tensors out; no state, no randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(CLASSES, WIDTH)
        self.stem = nn.Linear(NOISE, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3 * SIDE * SIDE)

    def forward(self, label_B: Tensor, z_BZ: Tensor) -> tuple[Tensor]:
        """Labels (B,) int64 and noise (B, Z) → RGB images (B, 3, 8, 8) in [0, 1]."""
        x_BD = self.classes(label_B) + self.stem(z_BZ)
        for block in self.blocks:
            x_BD = block(x_BD)
        return (torch.sigmoid(self.head(x_BD)).unflatten(1, (3, SIDE, SIDE)),)


PLAN = Plan(
    inputs=(Input("label", "int64", ("batch",), minimum=0, maximum=CLASSES - 1, doc="class of each image"),),
    state=(State("image", "float32", ("batch", 3, SIDE, SIDE)),),
    noise=(Noise("z", "normal", ("batch", NOISE)),),
    calls=(Call("paint", {"label": "input.label", "z": "noise.z"}, {"image": "image"}),),
    output="image",
)


def load(entry: ModelEntry, checkpoint: str | None, vae_checkpoint: str | None) -> Generator:
    """Ink has no published weights and no decoder of its own: `checkpoint` is required."""
    if checkpoint is None or vae_checkpoint is not None:
        raise CheckpointError(f"{entry.name} is made of one file: pass --checkpoint FILE, and no --vae-checkpoint")
    opened = open_checkpoint(checkpoint)
    ink = build_strict(Ink, opened.state, f"{entry.name} ({Path(checkpoint).name})")
    return assemble(entry, ink, {"model": sha256(opened.path)})


def random(entry: ModelEntry, seed: int) -> Generator:
    """The same shape without a file."""
    return assemble(random_entry(entry, seed), build_random(Ink, seed, "model."), {})


def assemble(entry: ModelEntry, ink: Ink, hashes: Mapping[str, str]) -> Generator:
    """Graphs, plan, and the matrices that may be quantised."""
    paint = GraphSpec(
        name="paint",
        module=ink,
        inputs=(Port("label", "int64", ("batch",)), Port("z", "float32", ("batch", NOISE))),
        outputs=(Port("image", "float32", ("batch", 3, SIDE, SIDE)),),
        example_dims={"batch": 3},
    )
    matrices = [name for name, part in ink.named_modules() if isinstance(part, nn.Linear)]
    return Generator(
        entry=entry,
        graphs=(paint,),
        plan=PLAN,
        layers={name: ("paint", f"{name}.weight") for name in matrices},
        default_layers=("blocks.*",),
        draw=None,  # it draws no tokens, and so there is no teacher forcing to judge it by
        quality=None,
        tables={},
        checkpoint_sha256=hashes,
    )


def recognise(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Sequence[str]:
    """Ink is the only one with a stem from 16 to 64."""
    return ("ink-8",) if shapes.get("stem.weight") == (WIDTH, NOISE) else ()


FAMILY = Family(
    name="ink",
    entries=(
        ModelEntry(
            name="ink-8",
            family="ink",
            image_size=SIDE,
            num_classes=CLASSES,
            parameters=sum(p.numel() for p in Ink().parameters()),
            files=("ink.safetensors",),
            source="made for a test",
            licence="Apache-2.0",
            bundled=False,
        ),
    ),
    load=load,
    recognise=recognise,
    random=random,
)
