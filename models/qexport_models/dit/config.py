"""Configurations of DiT: the published ones (arXiv:2212.09748, table 1) and the small ones trained on CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass

from qexport.errors import InputError
from qexport.suggest import nearest

FREQUENCIES = 128
"""Half the width of the sinusoidal timestep features."""

LATENT_DOWNSAMPLING = 8
"""Pixels per latent, in each direction, of the autoencoder that the published models use."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a DiT.

    `input_size` is the side of the latent in latent pixels, `patch_size` the side of a token in them. The model
    predicts `in_channels` of noise and, for `learn_sigma`, as many of variance. `frequency_denominator` d gives the
    timestep frequencies 10000^(−i/d), i = 0 … 127: 128 is the published model, 127 is what diffusers computes.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    frequency_denominator: int = 128

    def __post_init__(self) -> None:
        """Check that the sizes divide.

        Raises:
            InputError: naming the two that do not.
        """
        for whole, part in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
            size, divisor = getattr(self, whole), getattr(self, part)
            if size % divisor:
                raise InputError(f"DiT {whole} {size} is not a multiple of {part} {divisor}")
        if self.hidden_size % 4:
            raise InputError(f"DiT hidden_size {self.hidden_size} is not a multiple of 4, as its 2-D positions need")

    @property
    def out_channels(self) -> int:
        """Channels of the output: noise, then variance if it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid_size**2

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the hidden layer of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def parameters(self) -> int:
        """How many numbers a checkpoint holds, the fixed position table included."""
        width, pixels = self.hidden_size, self.patch_size**2
        embed = (pixels * self.in_channels + 1) * width + (self.num_tokens + self.num_classes + 1) * width
        timestep = (2 * FREQUENCIES + 1) * width + (width + 1) * width
        attention = (width + 1) * 4 * width
        mlp = (width + 1) * self.mlp_size + (self.mlp_size + 1) * width
        block = attention + mlp + (width + 1) * 6 * width
        final = (width + 1) * (pixels * self.out_channels + 2 * width)
        return embed + timestep + self.depth * block + final

    @property
    def null_class(self) -> int:
        """The label that means "no class"; its embedding was trained by dropping labels."""
        return self.num_classes


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
"""Hidden size, depth, heads."""

_C10_DEPTHS = (2, 3, 4, 5)


def _configs() -> dict[str, DiTConfig]:
    configs = {
        f"dit-{size}-{patch}-{pixels}": DiTConfig(
            input_size=pixels // LATENT_DOWNSAMPLING,
            patch_size=patch,
            hidden_size=hidden,
            depth=depth,
            num_heads=heads,
        )
        for size, (hidden, depth, heads) in _SIZES.items()
        for patch in (2, 4, 8)
        for pixels in (256, 512)
    }
    for depth in _C10_DEPTHS:
        configs[f"dit-c10-d{depth}"] = DiTConfig(
            input_size=16, patch_size=2, hidden_size=64 * depth, depth=depth, num_heads=depth, num_classes=10
        )
    return configs


CONFIGS: dict[str, DiTConfig] = _configs()
"""Every configuration by model name."""


def config(name: str) -> DiTConfig:
    """The configuration called `name`.

    Raises:
        InputError: there is none; the message suggests the nearest names.
    """
    if name not in CONFIGS:
        raise InputError(f"unknown DiT configuration {name!r}{nearest(name, CONFIGS)}")
    return CONFIGS[name]
