"""The `token` graph: one token of every image, guidance and drawing included.

The class token is position 0 of the same loop, so this graph is the prefill too. Each image runs twice, with its class
and with the null class: rows 0 … B − 1 are conditional, rows B … 2B − 1 unconditional. With ``cfg <= 1`` the second
half is computed and ignored: one graph serves both.

Caches have room for all positions from the start. A step writes its row with a scatter along the positions
(`ScatterElements`) and attends under a mask, so all shapes but the batch are fixed and the whole loop can reuse its
memory: the scatter is the only reader of the graph's input and gives the graph's output directly, so a runtime that
binds both to one buffer writes a row in place. Of the standard forms, measured on a cache (8, 12, 256, 64), ONNX
Runtime 1.31 CPU, one thread, median of 60: `ScatterElements` 0.33 ms (0.17 in place), `Where` on the position 1.6,
slice and concat 0.27 (not in place by nature), opset-24 `TensorScatter` 0.17 (0.004 in place; a target may rewrite to
it).

The row of the rotary table is an input: the plan's table holds it in float32, where a buffer of the graph would be
stored in fp16 like every matrix, and the graph needs no lookup.

Legend: B images (2B rows under guidance), C width, H heads, S = `length` positions, D head width, P rotary pairs,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexport_models.llamagen.config import GPTConfig
from qexport_models.llamagen.model import GPT
from qexport_models.sampling import draw_tokens


class Embed(nn.Module):
    """The token that enters the layers, where it goes, and what it may see."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.config = gpt.config
        self.cls_embedding, self.tok_embeddings = gpt.cls_embedding, gpt.tok_embeddings

    def forward(self, label_B: Tensor, token_B1: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns x (2B, 1, C), the slot to be written (2B, H, 1, D) int64, and the mask of what is seen (1, S)."""
        config = self.config
        null_B = torch.full_like(label_B, config.num_classes)
        class_B1C = self.cls_embedding(torch.cat((label_B, null_B))).unsqueeze(1)
        token_B1C = self.tok_embeddings(torch.cat((token_B1, token_B1)))
        x_B1C = torch.where(position == 0, class_B1C, token_B1C)
        slot_BH1D = position.expand(x_B1C.shape[0], config.heads, 1, config.head_width)
        seen_1S = (_slots(config, position) <= position).unsqueeze(0)
        return x_B1C, slot_BH1D, seen_1S


class Draw(nn.Module):
    """From the layers' output to the next token and the sequence with it."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.config = gpt.config
        self.norm, self.output = gpt.norm, gpt.output

    def forward(
        self,
        x_B1C: Tensor,
        sequence_BS: Tensor,
        uniform_B1: Tensor,
        position: Tensor,
        cfg: Tensor,
        cfg_interval: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        temperature: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the token, guided logits and the sequence; see `TokenStep`."""
        batch = sequence_BS.shape[0]
        logits = self.output(self.norm(x_B1C)).float()
        conditional, unconditional = logits[:batch], logits[batch:]
        # The original counts from the first token after the class's, and never turns the first one off.
        over = (cfg_interval >= 0) & (position - 1 > cfg_interval)
        guided = unconditional + (conditional - unconditional) * cfg
        logits_B1V = torch.where((cfg > 1) & ~over, guided, conditional)
        token_B1 = draw_tokens(logits_B1V, uniform_B1, top_k, top_p, temperature)
        here_S = _slots(self.config, position) == position
        return token_B1, logits_B1V, torch.where(here_S, token_B1, sequence_BS)


class TokenStep(nn.Module):
    """Position p of the loop: takes token p − 1 (at p = 0 the class) and draws token p."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.config = gpt.config
        self.embed = Embed(gpt)
        self.layers = gpt.layers
        self.draw = Draw(gpt)

    def forward(
        self,
        label_B: Tensor,
        token_B1: Tensor,
        sequence_BS: Tensor,
        uniform_B1: Tensor,
        position: Tensor,
        rope_P2: Tensor,
        cfg: Tensor,
        cfg_interval: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        temperature: Tensor,
        *caches_BHSD: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step of the sampling loop.

        Args:
            label_B: class of each image, int64.
            token_B1: the token drawn before, int64; ignored at position 0.
            sequence_BS: tokens so far, int64.
            uniform_B1: float32 in [0, 1).
            position: int64 scalar, 0 … length − 1.
            rope_P2: row `position` of the rotary table, float32.
            cfg: float32 scalar s: guided = uncond + s · (cond − uncond) for s > 1, else the conditional logits.
            cfg_interval: int64 scalar; if ≥ 0, guidance stops after position `cfg_interval` + 1.
            top_k: int64 scalar, see `sampling`.
            top_p: float32 scalar, see `sampling`.
            temperature: float32 scalar, see `sampling`.
            caches_BHSD: keys of layer 0, values of layer 0, keys of layer 1, …, float32, 2B rows; positions that are
                not written yet are ignored.

        Returns:
            The token drawn (B, 1), its guided and unfiltered logits (B, 1, V), the sequence with it, and the caches.
        """
        x_B1C, slot_BH1D, seen_1S = self.embed(label_B, token_B1, position)
        updated: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x_B1C, keys, values = layer(x_B1C, rope_P2, slot_BH1D, seen_1S, caches_BHSD[2 * i], caches_BHSD[2 * i + 1])
            updated += [keys, values]
        drawn = self.draw(x_B1C, sequence_BS, uniform_B1, position, cfg, cfg_interval, top_k, top_p, temperature)
        return *drawn, *updated


def _slots(config: GPTConfig, position: Tensor) -> Tensor:
    return torch.arange(config.length, device=position.device)
