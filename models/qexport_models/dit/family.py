"""The DiT family: what can be loaded, and how."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qexport.family import UNPUBLISHED, DenoiseSpec, Effort, Family, Generator, ModelEntry, random_entry, random_seed
from qexport_models.autoencoder_kl.config import KLVAE_C10, SD_VAE
from qexport_models.autoencoder_kl.decode import Decode
from qexport_models.autoencoder_kl.load import build_autoencoder_kl
from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.checkpoints import VAE_OPTION, companion, locate, read_state, sha256
from qexport_models.dit.config import CONFIGS, DiTConfig
from qexport_models.dit.denoise import DenoiseStep
from qexport_models.dit.embed import position_table
from qexport_models.dit.folds import folds, steps
from qexport_models.dit.load import build_dit
from qexport_models.dit.model import DiT
from qexport_models.dit.sampling_plan import (
    C10_SCHEDULE,
    NOISE_PORT,
    OUTPUT_PORT,
    PUBLISHED_SCHEDULE,
    STATE_PORT,
    graphs,
    plan,
    tables,
)
from qexport_models.dit.schedule import ROW_COLUMNS, TRAINING_STEPS, linear_betas
from qexport_models.featurenet import Cifar10Features
from qexport_models.published import with_commits
from qexport_models.random_weights import Fan, Normal, Rules, build_random
from qexport_models.recognise import recognise_dit

BLOCK_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
OTHER_LAYERS = ("t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
DEFAULT_LAYERS = ("blocks.*",)

C10_CLASSES = 10
BUNDLED = ("dit-c10-d2", "dit-c10-d3", "dit-c10-d4")
PUBLISHED = ("dit-xl-2-256", "dit-xl-2-512")
EFFORT = Effort(samples=1, schedule="ddpm-10", calibration_samples=8, calibration_schedule="ddim-25")
"""Of the published sizes: 250 steps of DiT-XL/2 take two cores ten minutes an image, on each of five sides."""

C10_EFFORT = Effort(samples=32, calibration_schedule="ddim-25")
SD_VAE_FILE = "sd-vae-ft-ema/diffusion_pytorch_model.safetensors"
LICENCE = "CC-BY-NC-4.0: non-commercial use only, of the weights and of what is made from them"
OWN_LICENCE = "your own"


class DiTQuality:
    """One evaluation of a DiT on noisy latents (`qexport.family.DenoiserModel`)."""

    def __init__(self, dit: DiT, vae: AutoencoderKL) -> None:
        self.dit, self.vae = dit, vae
        self._alphas_cumprod = torch.cumprod(1 - torch.from_numpy(linear_betas()), dim=0)  # float64

    @property
    def timesteps(self) -> int:
        """Timesteps of training."""
        return TRAINING_STEPS

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] → mean latents, scaled."""
        return self.vae.encode_mean(images * 2 - 1) * self.vae.config.scaling_factor

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """√ᾱ_t·latents + √(1 − ᾱ_t)·noise (arXiv:2006.11239, equation 4), coefficients rounded to float32 once."""
        alpha = self._alphas_cumprod[t][:, None, None, None]
        return alpha.sqrt().float() * latents + (1 - alpha).sqrt().float() * noise

    def denoise(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise, then the variance coordinate: (n, 2C, h, w); with gradients, where the parameters want any."""
        return self.dit(noisy, t, labels)

    def graph_inputs(self, noisy: np.ndarray, t: int, labels: np.ndarray) -> Mapping[str, np.ndarray]:
        """Feeds of `denoise` with guidance 1, which is none, and a row with nothing but the timestep."""
        row = np.zeros(len(ROW_COLUMNS), np.float32)
        row[ROW_COLUMNS.index("timestep")] = t
        return {
            "label": labels, "x": noisy, NOISE_PORT: np.zeros_like(noisy), "row": row,
            "cfg": np.array(1, np.float32), "eta": np.array(0, np.float32),
        }  # fmt: skip


def load(entry: ModelEntry, checkpoint: str | None, vae_checkpoint: str | None) -> Generator:
    """Build one of `ENTRIES` from its files; a diffusers folder as `checkpoint` holds the autoencoder too.

    Raises:
        CheckpointError: a file is missing, unreadable, or of another architecture.
    """
    paths = {"model": locate(entry, entry.files[0], checkpoint, "--checkpoint")}
    # First this file: where it is another model's, its decoder would be asked for in vain.
    dit = build_dit(entry.config["dit"], read_state(paths["model"]))
    paths["vae"] = locate(entry, entry.files[1], vae_checkpoint or companion(checkpoint), VAE_OPTION)
    vae = build_autoencoder_kl(entry.config["vae"], read_state(paths["vae"], "vae"))
    return assemble(with_commits(entry, paths), dit, vae, {role: sha256(path) for role, path in paths.items()})


RANDOM_DIT: Rules = (
    (r"embedding_table\.weight$", Normal(0.5)),
    (r"adaLN_modulation\.1\.weight$", Fan(1.5)),
)
"""Classes that differ, and gates of some tenths, so that every block counts, as trained ones do."""

RANDOM_VAE: Rules = ((r"decoder\.conv_out\.weight$", Fan(0.35)),)
"""Pixels that mostly stay inside [−1, 1]."""


def random(entry: ModelEntry, seed: int) -> Generator:
    """One of `ENTRIES` in shape, filled with random numbers; the position table is what it always is."""
    config: DiTConfig = entry.config["dit"]
    dit = build_random(lambda: DiT(config), seed, "model.", RANDOM_DIT)
    dit.pos_embed.copy_(torch.from_numpy(position_table(config.hidden_size, config.grid_size))[None])
    vae = build_random(lambda: AutoencoderKL(entry.config["vae"]), seed, "vae.", RANDOM_VAE)
    return assemble(random_entry(entry, seed), dit, vae, {})


def assemble(entry: ModelEntry, dit: DiT, vae: AutoencoderKL, hashes: Mapping[str, str]) -> Generator:
    """A generator from modules that are loaded."""
    config = dit.config
    names = (*(f"blocks.{i}.{layer}" for i in range(config.depth) for layer in BLOCK_LAYERS), *OTHER_LAYERS)
    return Generator(
        entry=entry,
        graphs=graphs(config, DenoiseStep(dit), Decode(vae)),
        plan=plan(config, entry.image_size, C10_SCHEDULE if config.num_classes == C10_CLASSES else PUBLISHED_SCHEDULE),
        layers={name: ("denoise", f"{name}.weight") for name in names},
        default_layers=DEFAULT_LAYERS,
        draw=None,
        quality=None,
        tables=tables(),
        checkpoint_sha256=hashes,
        features=Cifar10Features() if config.num_classes == C10_CLASSES and random_seed(entry.source) is None else None,
        denoise=DenoiseSpec("denoise", DiTQuality(dit, vae), state=STATE_PORT, output=OUTPUT_PORT),
        effort=C10_EFFORT if config.num_classes == C10_CLASSES else EFFORT,
        folds=folds(config),
        steps=steps(tables()),
    )


def _entry(name: str, config: DiTConfig) -> ModelEntry:
    reference = config.num_classes == C10_CLASSES
    vae = KLVAE_C10 if reference else SD_VAE
    image_size = config.input_size * vae.downsampling
    if reference:
        files = (f"{name}.safetensors", "klvae-c10.safetensors")
        trained = "trained for this project on CIFAR-10"
        source, licence = trained if name in BUNDLED else f"{UNPUBLISHED} (docs/training.md)", "Apache-2.0"
    else:
        size = "-".join(name.split("-")[1:3]).upper()
        files = (f"DiT-{size}-{image_size}x{image_size}.pt", SD_VAE_FILE)
        folder = "dl.fbaipublicfiles.com/DiT/models" if name in PUBLISHED else UNPUBLISHED
        source = f"{folder}; VAE Hugging Face stabilityai/sd-vae-ft-ema (MIT)"
        licence = LICENCE if name in PUBLISHED else OWN_LICENCE
    return ModelEntry(
        name=name,
        family="dit",
        image_size=image_size,
        num_classes=config.num_classes,
        parameters=config.parameters,
        files=files,
        source=source,
        licence=licence,
        bundled=name in BUNDLED,
        config={"dit": config, "vae": vae},
    )


ENTRIES = tuple(_entry(name, config) for name, config in CONFIGS.items())

FAMILY = Family("dit", ENTRIES, load, recognise=recognise_dit, random=random)
