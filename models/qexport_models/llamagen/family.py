"""The LlamaGen family: what can be loaded, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qexport.family import UNPUBLISHED, DrawSpec, Effort, Family, Generator, ModelEntry, random_entry
from qexport_models.checkpoints import VAE_OPTION, companion, locate, read_state, sha256
from qexport_models.llamagen.config import GPT_CONFIGS, VQ_CONFIGS
from qexport_models.llamagen.decode import Decode
from qexport_models.llamagen.folds import folds
from qexport_models.llamagen.model import GPT
from qexport_models.llamagen.sampling_plan import graphs, plan, tables
from qexport_models.llamagen.token_step import TokenStep
from qexport_models.llamagen.vq import VQ
from qexport_models.published import with_commits
from qexport_models.random_weights import Fan, Normal, Rules, build_random
from qexport_models.recognise import describe, recognise_llamagen
from qexport_models.strict_load import build_strict

LAYER_MATRICES = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
OTHER_MATRICES = ("output",)
DEFAULT_LAYERS = ("layers.*",)
PUBLISHED_LENGTH = 256
TOKENIZER = "vq-16"
TOKENIZER_FILE = "vq_ds16_c2i.pt"

EFFORT = Effort(samples=2, calibration_samples=16)
"""Of the published ones: each step of the loop reads every weight, so two images take as long as many."""

DEFAULT_CFG = 2.0
"""Guidance of a model whose entry names none."""

_SIZES = {
    "b": (110_888_448, 2.0),
    "l": (342_910_976, 2.0),
    "xl": (774_699_520, 1.75),
    "xxl": (1_410_972_672, 1.75),
    "3b": (3_096_659_200, 1.65),
    "1b": (1_199_616_000, DEFAULT_CFG),
    "xxxl": (3_893_027_840, DEFAULT_CFG),
}
"""Parameters, and the guidance at which the published FID was measured (LlamaGen, appendix), where there is one."""

_UNPUBLISHED = ("1b", "xxxl")
_HUB = "Hugging Face FoundationVision/LlamaGen"


class LlamaGenQuality:
    """Teacher forcing of a LlamaGen model (`qexport.family.LogitModel`)."""

    def __init__(self, gpt: GPT, vq: VQ) -> None:
        self.gpt, self.vq = gpt, vq

    @property
    def scale_lengths(self) -> Sequence[int]:
        """One group: all tokens of an image."""
        return (self.gpt.config.length,)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] → tokens (n, L)."""
        return self.vq.encode(images)

    def teacher_forced_logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Labels (n,), tokens (n, L) → logits (n, L, V); with gradients, where the parameters want any."""
        return self.gpt(labels, tokens[:, :-1])


def load(entry: ModelEntry, checkpoint: str | None, vae_checkpoint: str | None) -> Generator:
    """Build one of `ENTRIES` from its files.

    The published files of one size at 256 and at 384 pixels have the same layout (positions are not in them), so which
    of the two a file is cannot be seen: the wrong one draws poor pictures.

    Raises:
        CheckpointError: a file is missing, unreadable, or of another architecture.
    """
    config, vq_config = entry.config["gpt"], entry.config["vq"]
    paths = {"model": locate(entry, entry.files[0], checkpoint, "--checkpoint")}
    gpt = build_strict(lambda: GPT(config), read_state(paths["model"]), f"{entry.name} ({paths['model'].name})")
    # Only now: where the file above is another model's, its decoder would be asked for in vain.
    paths["vae"] = locate(entry, entry.files[1], vae_checkpoint or companion(checkpoint), VAE_OPTION)
    vq = build_strict(lambda: VQ(vq_config), read_state(paths["vae"], "vae"), f"its VQ tokeniser ({paths['vae'].name})")
    return assemble(with_commits(entry, paths), gpt, vq, {role: sha256(path) for role, path in paths.items()})


RANDOM_GPT: Rules = (
    (r"(tok_embeddings|embedding_table)\.weight$", Normal(0.5)),
    (r"^output\.weight$", Fan(2.0)),
)
"""Classes and tokens that differ, and logits that spread by about 2, as trained ones do."""

RANDOM_VQ: Rules = (
    (r"quantize\.embedding\.weight$", Normal(1.0)),
    (r"decoder\.conv_out\.weight$", Fan(0.35)),
)
"""Codes in every direction, and pixels that mostly stay inside [−1, 1]."""


def random(entry: ModelEntry, seed: int) -> Generator:
    """One of `ENTRIES` in shape, filled with random numbers."""
    gpt = build_random(lambda: GPT(entry.config["gpt"]), seed, "model.", RANDOM_GPT)
    vq = build_random(lambda: VQ(entry.config["vq"]), seed, "vae.", RANDOM_VQ)
    return assemble(random_entry(entry, seed), gpt, vq, {})


def assemble(entry: ModelEntry, gpt: GPT, vq: VQ, hashes: Mapping[str, str]) -> Generator:
    """A generator from modules that are loaded, of whatever size; `entry` is only its label.

    Raises:
        ValueError: tokeniser and transformer have different vocabularies.
    """
    config = gpt.config
    if vq.config.codes != config.vocab_size:
        raise ValueError(f"the tokeniser has {vq.config.codes} codes, the transformer {config.vocab_size}")
    layers = [f"layers.{i}.{matrix}" for i in range(config.depth) for matrix in LAYER_MATRICES]
    return Generator(
        entry=entry,
        graphs=graphs(config, TokenStep(gpt), Decode(vq, config.side)),
        plan=plan(config, vq.config, entry.config.get("cfg", DEFAULT_CFG)),
        layers={name: ("token", f"{name}.weight") for name in (*layers, *OTHER_MATRICES)},
        default_layers=DEFAULT_LAYERS,
        draw=DrawSpec(graph="token", tokens="next_token"),
        quality=LlamaGenQuality(gpt, vq),
        tables=tables(config),
        checkpoint_sha256=hashes,
        effort=EFFORT if config.length >= PUBLISHED_LENGTH else Effort(),
        folds=folds(config),
    )


def _entry(name: str) -> ModelEntry:
    _, size, pixels = name.split("-")
    parameters, cfg = _SIZES[size]
    return ModelEntry(
        name=name,
        family="llamagen",
        image_size=int(pixels),
        num_classes=GPT_CONFIGS[name].num_classes,
        parameters=parameters,
        files=(f"c2i_{size.upper()}_{pixels}.pt", TOKENIZER_FILE),
        source=f"{UNPUBLISHED}; tokeniser {_HUB}" if size in _UNPUBLISHED else _HUB,
        licence="MIT",
        bundled=False,
        config={"gpt": GPT_CONFIGS[name], "vq": VQ_CONFIGS[TOKENIZER], "cfg": cfg},
    )


ENTRIES = tuple(_entry(name) for name in GPT_CONFIGS)

FAMILY = Family("llamagen", ENTRIES, load, recognise=recognise_llamagen, random=random, describe=describe)
"""`describe` knows the weights of all our families and of their neighbours; one of them is enough to say it."""
