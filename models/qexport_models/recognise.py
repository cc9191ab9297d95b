"""Which model a state dict is, told from its keys and shapes. Imports no torch.

A few facts are not in a state dict: LlamaGen's positions (so 256 and 384 pixels look alike) and, in diffusers' layout,
DiT's (so 256 and 512 do; but the ``config.json`` beside it says ``sample_size``). Then all candidates are returned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

from qexport_models.dit.config import CONFIGS as DIT_CONFIGS
from qexport_models.llamagen.config import GPT_CONFIGS

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Config = Mapping[str, Any]

VAR_NAMES: Mapping[int, tuple[str, frozenset[int]]] = {
    155: ("var-c10-d{}", frozenset((2, 3, 4, 5))),
    680: ("var-d{}", frozenset((16, 20, 24, 30))),
    2240: ("var-d{}-512", frozenset((36,))),
}
"""Tokens of an image → name, and the depths that there are."""

VAR_CLASSES = {155: 10, 680: 1000, 2240: 1000}
VAR_SHARED_ALN = frozenset((2240,))
VAR_WIDTH_PER_BLOCK = 64


def recognise_var(shapes: Shapes, config: Config | None = None) -> tuple[str, ...]:
    """The VAR whose state dict has these shapes, or nothing."""
    del config  # VAR's is all in the shapes
    if not _has(shapes, "pos_1LC", "class_emb.weight", "word_embed.weight", "blocks.0.attn.mat_qkv.weight"):
        return ()
    depth = _count(shapes, r"blocks\.(\d+)\.")
    length, width = shapes["pos_1LC"][1:]
    name, depths = VAR_NAMES.get(length, ("", frozenset[int]()))
    same = (
        depth in depths
        and width == VAR_WIDTH_PER_BLOCK * depth
        and shapes["class_emb.weight"][0] == VAR_CLASSES[length] + 1
        and ("shared_ada_lin.1.weight" in shapes) == (length in VAR_SHARED_ALN)
    )
    return (name.format(depth),) if same else ()


def recognise_dit(shapes: Shapes, config: Config | None = None) -> tuple[str, ...]:
    """The DiTs whose state dict, in the published layout or in diffusers', has these shapes."""
    found = _dit_sizes(shapes)
    if found is None:
        return ()
    hidden, depth, patch, channels, classes, tokens = found
    side = isqrt(tokens) * patch if tokens else (config or {}).get("sample_size")
    return tuple(
        name
        for name, c in DIT_CONFIGS.items()
        if (c.hidden_size, c.depth, c.patch_size, c.in_channels, c.num_classes)
        == (hidden, depth, patch, channels, classes)
        and side in (None, c.input_size)
    )


def recognise_llamagen(shapes: Shapes, config: Config | None = None) -> tuple[str, ...]:
    """The class-conditional LlamaGens whose state dict has these shapes: those of one size look alike."""
    del config  # LlamaGen has none
    classes_table = "cls_embedding.embedding_table.weight"
    if not _has(shapes, "tok_embeddings.weight", classes_table, "layers.0.attention.wqkv.weight"):
        return ()
    depth = _count(shapes, r"layers\.(\d+)\.")
    vocab, width = shapes["tok_embeddings.weight"]
    classes = shapes[classes_table][0] - 1
    return tuple(
        name
        for name, c in GPT_CONFIGS.items()
        if (c.depth, c.width, c.vocab_size, c.num_classes) == (depth, width, vocab, classes)
    )


_FAMILIES: tuple[Callable[[Shapes, Config | None], tuple[str, ...]], ...] = (
    recognise_var,
    recognise_dit,
    recognise_llamagen,
)

NO_SUCH_SIZE = "a size that no model here has; `qexport models` lists those that there are"
DECODER_ALONE = "a decoder and no generator: pass it as --vae-checkpoint"
NOT_OURS = "which is not supported: it draws every token by a diffusion of its own, which no family here plays"
KL16 = "MAR's decoder, which no generator here uses"
TEXT_TO_IMAGE = (
    "which cannot be played yet: it is conditioned on features that a T5 encoder makes of a caption, and no text "
    "encoder is supported"
)

_MAR_SIZES = {(24, 768): "MAR-B", (32, 1024): "MAR-L", (40, 1280): "MAR-H"}
"""Blocks of encoder and decoder together, and width (arXiv:2406.11838, table 1)."""


def looks_like(shapes: Shapes, config: Config | None = None) -> str | None:
    """What these shapes look like, in words for a message; None if they are of no architecture that is known here."""
    names = [name for recognise in _FAMILIES for name in recognise(shapes, config)]
    if names:
        return " or ".join(names)
    found = _described(shapes)
    return found and found[0]


def describe(shapes: Shapes) -> str | None:
    """What these shapes, which no model here has, are, and why they cannot be loaded as a model (`Family.describe`)."""
    found = _described(shapes)
    return found and ", ".join(found)


def _described(shapes: Shapes) -> tuple[str, str] | None:
    """Architectures without an entry of that size, neighbours that are not supported, decoders; and what of it."""
    if _has(shapes, "pos_1LC", "class_emb.weight", "blocks.0.attn.mat_qkv.weight"):
        depth, (length, width) = _count(shapes, r"blocks\.(\d+)\."), shapes["pos_1LC"][1:]
        classes = shapes["class_emb.weight"][0] - 1
        return f"a VAR with {depth} blocks of width {width}, {length} tokens and {classes} classes", NO_SUCH_SIZE
    if sizes := _dit_sizes(shapes):
        hidden, depth, patch, _, classes, _ = sizes
        return f"a DiT with {depth} blocks of width {hidden} and patch {patch}, for {classes} classes", NO_SUCH_SIZE
    if _has(shapes, "tok_embeddings.weight", "layers.0.attention.wqkv.weight"):
        depth, width = _count(shapes, r"layers\.(\d+)\."), shapes["tok_embeddings.weight"][1]
        captioned = "cls_embedding.uncond_embedding" in shapes
        kind, why = ("text-to-image LlamaGen", TEXT_TO_IMAGE) if captioned else ("LlamaGen", NO_SUCH_SIZE)
        return f"a {kind} with {depth} layers of width {width}", why
    if _has(shapes, "mask_token", "encoder_pos_embed_learned", "diffloss.net.input_proj.weight"):
        size = (_count(shapes, r"((?:en|de)coder_blocks\.\d+)\."), shapes["mask_token"][-1])
        return f"{_MAR_SIZES.get(size, 'a MAR')} (masked autoregressive model)", NOT_OURS
    if _has(shapes, *_COMPVIS) and shapes["post_quant_conv.weight"][:2] == (KL16_CHANNELS, KL16_CHANNELS):
        return f"a KL autoencoder (CompVis) of {KL16_CHANNELS} latent channels", KL16
    return next(((what, DECODER_ALONE) for keys, what in _DECODERS if _has(shapes, *keys)), None)


KL16_CHANNELS = 16
_COMPVIS = ("decoder.up.0.block.0.conv1.weight", "decoder.mid.block_1.conv1.weight", "post_quant_conv.weight")
_DECODERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("quantize.quant_resi.qresi_ls.0.weight", "decoder.conv_in.weight"), "VAR's VQVAE"),
    (("quantize.embedding.weight", "decoder.conv_blocks.0.res.0.conv1.weight"), "LlamaGen's VQ tokeniser"),
    (("decoder.up_blocks.0.resnets.0.conv1.weight", "post_quant_conv.weight"), "a KL autoencoder (diffusers)"),
    (_COMPVIS, "a KL autoencoder (CompVis)"),
)


def _dit_sizes(shapes: Shapes) -> tuple[int, int, int, int, int, int] | None:
    """Hidden size, depth, patch, channels, classes, tokens (0 in diffusers' layout, which has no position table)."""
    published = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed")
    diffusers = ("pos_embed.proj.weight", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")
    if _has(shapes, *published, "blocks.0.attn.qkv.weight"):
        patches, labels, depth = *published[:2], _count(shapes, r"blocks\.(\d+)\.")
        tokens = shapes["pos_embed"][1]
    elif _has(shapes, *diffusers):
        patches, labels, depth = *diffusers, _count(shapes, r"transformer_blocks\.(\d+)\.")
        tokens = 0
    else:
        return None
    hidden, channels, patch, _ = shapes[patches]
    return hidden, depth, patch, channels, shapes[labels][0] - 1, tokens


def _has(shapes: Shapes, *keys: str) -> bool:
    """Whether all keys are there, with as many dimensions as their kind of tensor has."""
    ranks = {"pos_1LC": 3, "pos_embed": 3, "mask_token": 3, "x_embedder.proj.weight": 4, "pos_embed.proj.weight": 4}
    matrices = ("class_emb.weight", "tok_embeddings.weight", "embedding_table.weight")
    return all(
        key in shapes and len(shapes[key]) == ranks.get(key, 2 if key.endswith(matrices) else len(shapes[key]))
        for key in keys
    )


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the keys have where the pattern has its group."""
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})
