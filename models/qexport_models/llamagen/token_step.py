"""The `token` graph: one token of every image, guidance and drawing included.

The class token is position 0 of the same loop, so this graph is the prefill too. Each image runs twice, with its class
and with the null class; that axis G leads (0 conditional, 1 unconditional), so that no tensor is split along the
batch. With ``cfg <= 1`` the second half is computed and ignored: one graph serves both.

Caches have room for all positions from the start. A step writes its row with a scatter along the positions
(`ScatterElements`) and attends under a mask, so all shapes but the batch are fixed and the whole loop can reuse its
memory: the scatter reads the graph's input and gives the graph's output directly, and a runtime that binds both to one
buffer writes a row in place. Of the standard forms, measured on a cache (2, 4, 12, 256, 64), ONNX Runtime 1.31 CPU, one
thread, median of 60: `ScatterElements` 0.33 ms (0.17 in place), `Where` on the position 1.6, slice and concat 0.27 (not
in place by nature), opset-24 `TensorScatter` 0.17 (0.004 in place; a target may rewrite to it).

Legend: G = 2 guidance halves, B images, C width, H heads, S = `length` positions, D head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexport_models.llamagen.model import GPT, Block
from qexport_models.sampling import draw_tokens


class TokenStep(nn.Module):
    """Position p of the loop: takes token p − 1 (at p = 0 the class) and draws token p.

    Submodules are held directly, so that initialisers keep the checkpoint's names (``layers.3.attention.wo.weight``).
    """

    rope_rows: Tensor

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.config = gpt.config
        self.cls_embedding, self.tok_embeddings = gpt.cls_embedding, gpt.tok_embeddings
        self.layers, self.norm, self.output = gpt.layers, gpt.norm, gpt.output
        self.register_buffer("rope_rows", gpt.rope_rows, persistent=False)

    def forward(
        self,
        label_B: Tensor,
        token_B1: Tensor,
        sequence_BS: Tensor,
        uniform_B1: Tensor,
        position: Tensor,
        cfg: Tensor,
        cfg_interval: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        temperature: Tensor,
        *caches_GBHSD: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step of the sampling loop.

        Args:
            label_B: class of each image, int64.
            token_B1: the token drawn before, int64; ignored at position 0.
            sequence_BS: tokens so far, int64.
            uniform_B1: float32 in [0, 1).
            position: int64 scalar, 0 … length − 1.
            cfg: float32 scalar s: guided = uncond + s · (cond − uncond) for s > 1, else the conditional logits.
            cfg_interval: int64 scalar; if ≥ 0, guidance stops after position `cfg_interval` + 1.
            top_k: int64 scalar, see `sampling`.
            top_p: float32 scalar, see `sampling`.
            temperature: float32 scalar, see `sampling`.
            caches_GBHSD: keys of layer 0, values of layer 0, keys of layer 1, … float32; rows ≥ position are ignored.

        Returns:
            The token drawn (B, 1), its guided and unfiltered logits (B, 1, V), the sequence with it, and the caches.
        """
        first = position == 0
        null_B = torch.full_like(label_B, self.config.num_classes)
        class_GBC = self.cls_embedding(torch.stack([label_B, null_B]))
        x_GBC = torch.where(first, class_GBC, self.tok_embeddings(token_B1).transpose(0, 1))

        x_B1C = x_GBC.flatten(0, 1).unsqueeze(1)
        at_1 = position.reshape(1)
        rope_1P2 = self.rope_rows.index_select(0, at_1)
        slots_S = torch.arange(self.config.length, device=position.device)
        seen_1S = (slots_S <= position).unsqueeze(0)
        updated: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            q, k, v = layer.project(x_B1C, rope_1P2)
            keys = _write_row(caches_GBHSD[2 * i], k, position)
            values = _write_row(caches_GBHSD[2 * i + 1], v, position)
            updated += [keys, values]
            x_B1C = layer.finish(x_B1C, q, keys.flatten(0, 1), values.flatten(0, 1), seen_1S)

        logits_GB1V = self.output(self.norm(x_B1C)).float().unflatten(0, (2, label_B.shape[0]))
        logits_B1V = self._guide(logits_GB1V, position, cfg, cfg_interval)
        token_B1 = draw_tokens(logits_B1V, uniform_B1, top_k, top_p, temperature)
        sequence_BS = torch.where(slots_S == position, token_B1, sequence_BS)
        return token_B1, logits_B1V, sequence_BS, *updated

    @staticmethod
    def _guide(logits_GB1V: Tensor, position: Tensor, cfg: Tensor, cfg_interval: Tensor) -> Tensor:
        conditional, unconditional = logits_GB1V[0], logits_GB1V[1]
        # The original counts from the first token after the class's, and never turns the first one off.
        over = (cfg_interval >= 0) & (position - 1 > cfg_interval)
        guided = unconditional + (conditional - unconditional) * cfg
        return torch.where((cfg > 1) & ~over, guided, conditional)


def _write_row(cache_GBHSD: Tensor, row_BH1D: Tensor, position: Tensor) -> Tensor:
    """The cache with row `position` replaced."""
    row_GBH1D = row_BH1D.unflatten(0, (2, cache_GBHSD.shape[1]))
    return cache_GBHSD.scatter(3, position.expand(row_GBH1D.shape), row_GBH1D)
