"""The VAR family: what can be loaded, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qexport.family import UNPUBLISHED, DrawSpec, Effort, Family, Generator, ModelEntry, random_entry, random_seed
from qexport_models.checkpoints import VAE_OPTION, companion, locate, read_state, sha256
from qexport_models.featurenet import Cifar10Features
from qexport_models.published import with_commits
from qexport_models.random_weights import Fan, Normal, Rules, build_random
from qexport_models.recognise import recognise_var
from qexport_models.strict_load import build_strict
from qexport_models.var.config import VARConfig, VQVAEConfig
from qexport_models.var.folds import folds, steps
from qexport_models.var.graphs import Decode, Step
from qexport_models.var.model import VAR
from qexport_models.var.sampling_plan import graphs, plan, tables
from qexport_models.var.vqvae import VQVAE

SCALES_32 = (1, 2, 3, 4, 5, 6, 8)
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
BUNDLED_DEPTHS = (2, 3, 4)
BLOCK_LAYERS = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2", "ada_lin.1")
OTHER_LAYERS = ("shared_ada_lin.1", "head_nm.ada_lin.1", "head", "word_embed")
DEFAULT_LAYERS = ("blocks.*",)

EFFORT = Effort(samples=1, calibration_samples=16)
"""Of the published sizes: one image has 680 tokens and more, and takes two cores ten seconds on each side."""


class VARQuality:
    """Teacher forcing of a VAR model (`qexport.family.LogitModel`)."""

    def __init__(self, var: VAR, vae: VQVAE) -> None:
        self.var, self.vae = var, vae

    @property
    def scale_lengths(self) -> Sequence[int]:
        """Tokens of each scale."""
        return self.var.config.tokens_per_scale

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] → tokens (n, L)."""
        return torch.cat(self.vae.tokenize(images * 2 - 1), dim=1)

    def teacher_forced_logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Labels (n,), tokens (n, L) → logits (n, L, V); with gradients, where the parameters want any.

        None reach the codebook and the φ convolutions: they also make the f_hat that is decoded, which no logit judges.
        """
        by_scale = list(torch.split(tokens, list(self.scale_lengths), dim=1))
        with torch.no_grad():
            maps = self.vae.quantize.teacher_forcing_input(by_scale)
        return self.var(labels, maps)


def load(entry: ModelEntry, checkpoint: str | None, vae_checkpoint: str | None) -> Generator:
    """Build one of `ENTRIES` from its files; a `checkpoint` of VAR's trainer holds its VQVAE too.

    Raises:
        CheckpointError: a file is missing, unreadable, or of another architecture.
    """
    config, vae_config = entry.config["var"], entry.config["vae"]
    path = locate(entry, entry.files[0], checkpoint, "--checkpoint")
    # First this file: where it is another model's, its decoder would be asked for in vain.
    var = build_strict(lambda: VAR(config), read_state(path), f"{entry.name} ({path.name})")
    vae_path = locate(entry, entry.files[1], vae_checkpoint or companion(checkpoint), VAE_OPTION)
    vae = build_strict(lambda: VQVAE(vae_config), read_state(vae_path, "vae"), f"its VQVAE ({vae_path.name})")
    paths = {"model": path, "vae": vae_path}
    return assemble(with_commits(entry, paths), var, vae, {role: sha256(path) for role, path in paths.items()})


RANDOM_VAR: Rules = (
    (r"scale_mul_1H11$", Normal(0.2, math.log(4.0))),
    (r"(pos_start|pos_1LC)$", Normal(0.3)),
    (r"(lvl_embed|class_emb)\.weight$", Normal(0.5)),
    (r"ada_gss$", Normal(0.3)),
    (r"shared_ada_lin\.1\.weight$", Fan(1.0)),
    (r"ada_lin\.1\.weight$", Fan(1.5)),
    (r"head\.weight$", Fan(2.0)),
)
"""Gates of some tenths, so that every block counts, and logits that spread by about 2, as trained ones do."""

RANDOM_VAE: Rules = (
    (r"quantize\.embedding\.weight$", Normal(1.0)),
    (r"decoder\.conv_out\.weight$", Fan(0.35)),
)
"""Codes of unit variance, and pixels that mostly stay inside [−1, 1]."""


def random(entry: ModelEntry, seed: int) -> Generator:
    """One of `ENTRIES` in shape, filled with random numbers."""
    var = build_random(lambda: VAR(entry.config["var"]), seed, "model.", RANDOM_VAR)
    vae = build_random(lambda: VQVAE(entry.config["vae"]), seed, "vae.", RANDOM_VAE)
    return assemble(random_entry(entry, seed), var, vae, {})


def assemble(entry: ModelEntry, var: VAR, vae: VQVAE, hashes: dict[str, str]) -> Generator:
    """A generator from modules that are loaded."""
    config = var.config
    names = [f"blocks.{i}.{layer}" for i in range(config.depth) for layer in BLOCK_LAYERS]
    parameters = dict(var.named_parameters())
    layers = [name for name in (*names, *OTHER_LAYERS) if f"{name}.weight" in parameters]
    return Generator(
        entry=entry,
        graphs=graphs(config, Step(var, vae), Decode(vae)),
        plan=plan(config, vae.config),
        layers={name: ("step", f"{name}.weight") for name in layers},
        default_layers=DEFAULT_LAYERS,
        draw=DrawSpec(graph="step"),
        quality=VARQuality(var, vae),
        tables=tables(config),
        checkpoint_sha256=hashes,
        features=Cifar10Features() if config.scales == SCALES_32 and random_seed(entry.source) is None else None,
        effort=Effort() if config.scales == SCALES_32 else EFFORT,
        folds=folds(config),
        steps=steps(config),
    )


def _entry(depth: int, scales: tuple[int, ...], name: str, parameters: int) -> ModelEntry:
    reference = scales == SCALES_32
    large = scales == SCALES_512
    config = VARConfig(
        depth=depth, width=64 * depth, heads=depth, num_classes=10 if reference else 1000,
        scales=scales, vocab_size=4096, z_channels=32, shared_aln=large,
    )  # fmt: skip
    vae = (
        VQVAEConfig(4096, 32, 64, (1, 2, 2), scales)
        if reference
        else VQVAEConfig(4096, 32, 160, (1, 1, 2, 2, 4), scales)
    )
    bundled = reference and depth in BUNDLED_DEPTHS
    source = "Hugging Face FoundationVision/var"
    if reference:
        source = "trained for this project on CIFAR-10" if bundled else f"{UNPUBLISHED} (docs/training.md)"
    return ModelEntry(
        name=name,
        family="var",
        image_size=scales[-1] * vae.downsample,
        num_classes=config.num_classes,
        parameters=parameters,
        files=(f"{name}.safetensors", "vqvae-c10.safetensors")
        if reference
        else (f"var_d{depth}.pth", "vae_ch160v4096z32.pth"),
        source=source,
        licence="Apache-2.0" if reference else "MIT",
        bundled=bundled,
        config={"var": config, "vae": vae},
    )  # fmt: skip


ENTRIES = (
    _entry(2, SCALES_32, "var-c10-d2", 1_181_316),
    _entry(3, SCALES_32, "var-c10-d3", 2_903_113),
    _entry(4, SCALES_32, "var-c10-d4", 5_970_192),
    _entry(16, SCALES_256, "var-d16", 310_283_520),
    _entry(20, SCALES_256, "var-d20", 600_917_136),
    _entry(24, SCALES_256, "var-d24", 1_033_399_360),
    _entry(30, SCALES_256, "var-d30", 2_010_020_356),
    _entry(36, SCALES_512, "var-d36-512", 2_353_893_904),
    _entry(5, SCALES_32, "var-c10-d5", 10_824_921),  # its weights are not bundled
)

FAMILY = Family("var", ENTRIES, load, recognise=recognise_var, random=random)
