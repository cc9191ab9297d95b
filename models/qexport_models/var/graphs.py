"""The two graphs of a VAR bundle: `step` draws the tokens of one scale, `decode` turns f_hat into pixels.

Both take everything they need as inputs and return everything they change, so that one graph serves every scale. They
share no weight: `step` owns the transformer, the codebook and the φ convolutions, `decode` the convolutional decoder.
Legend: B images, L new tokens, P tokens already cached, N tokens of the next scale, Z latent channels, V codes,
X = side² positions of f_hat, H heads, Q head width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.sampling import draw_tokens
from qexport_models.var.model import VAR
from qexport_models.var.vqvae import VQVAE, Quantizer


class Embed(nn.Module):
    """The tokens that enter the blocks, and what the blocks are modulated by."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.config = var.config
        self.pos_start, self.pos_1LC = var.pos_start, var.pos_1LC
        self.word_embed, self.class_emb, self.lvl_embed = var.word_embed, var.class_emb, var.lvl_embed
        if var.config.shared_aln:
            self.shared_ada_lin = var.shared_ada_lin

    def forward(
        self, label_B: Tensor, map_BLZ: Tensor, scale: Tensor, positions_L: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns tokens (2B, L, D), class embeddings (2B, D), and the modulation; the last B rows have no class."""
        null_B = torch.full_like(label_B, self.config.num_classes)
        class_BD = self.class_emb(torch.cat((label_B, null_B)))
        embedded = self.word_embed(map_BLZ)
        embedded = torch.cat((embedded, embedded))
        x_BLD = torch.where(scale == 0, class_BD[:, None] + self.pos_start, embedded)
        x_BLD = x_BLD + (self.pos_1LC[0, positions_L] + self.lvl_embed(scale))
        modulation = class_BD
        if self.config.shared_aln:
            modulation = self.shared_ada_lin(class_BD).view(-1, 1, 6, self.config.width)
        return x_BLD, class_BD, modulation


class Codebook(nn.Module):
    """What sampling needs of the quantiser: codes and φ convolutions, without training statistics."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.embedding, self.quant_resi = quantizer.embedding, quantizer.quant_resi

    def phi(self, h_BZHW: Tensor, index: Tensor) -> Tensor:
        """φ number `index`: all convolutions in one (they are tiny), then the one that counts."""
        phi = self.quant_resi
        convolutions = cast(list[nn.Conv2d], list(phi.qresi_ls))
        weight = torch.cat([conv.weight for conv in convolutions])
        bias = torch.cat([cast(Tensor, conv.bias) for conv in convolutions])
        all_BKZHW = F.conv2d(h_BZHW, weight, bias, padding=1).unflatten(1, (len(convolutions), -1))
        chosen = torch.index_select(all_BKZHW, 1, index[None])[:, 0]
        return h_BZHW * (1 - phi.ratio) + chosen * phi.ratio


class Draw(nn.Module):
    """From the blocks' output to tokens, the grown f_hat and the next map."""

    def __init__(self, var: VAR, vae: VQVAE) -> None:
        super().__init__()
        self.config = var.config
        self.head_nm, self.head = var.head_nm, var.head
        self.quantize = Codebook(vae.quantize)

    def forward(
        self,
        x_BLD: Tensor,
        class_BD: Tensor,
        f_hat_BZX: Tensor,
        uniform_BL: Tensor,
        cfg: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        temperature: Tensor,
        scale: Tensor,
        phi: Tensor,
        up_XL: Tensor,
        down_NX: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns tokens, guided logits, f_hat and the next map; see `Step`."""
        config = self.config
        batch = f_hat_BZX.shape[0]
        logits = self.head(self.head_nm(x_BLD, class_BD))
        t = cfg * scale / (len(config.scales) - 1)
        guided_BLV = logits[:batch] * (1 + t) - logits[batch:] * t
        tokens_BL = draw_tokens(guided_BLV, uniform_BL, top_k, top_p, temperature)

        side = config.scales[-1]
        h_BZX = (up_XL @ self.quantize.embedding(tokens_BL)).transpose(1, 2)
        h_BZHW = self.quantize.phi(h_BZX.reshape(batch, config.z_channels, side, side), phi)
        f_hat_BZX = f_hat_BZX + h_BZHW.flatten(2)
        return tokens_BL, guided_BLV, f_hat_BZX, down_NX @ f_hat_BZX.transpose(1, 2)


class Step(nn.Module):
    """One scale: embed the map, run the blocks over the cache, guide, filter, draw, accumulate f_hat, shrink it."""

    def __init__(self, var: VAR, vae: VQVAE) -> None:
        super().__init__()
        self.embed = Embed(var)
        self.blocks = var.blocks
        self.draw = Draw(var, vae)

    def forward(
        self,
        label_B: Tensor,
        map_BLZ: Tensor,
        f_hat_BZX: Tensor,
        uniform_BL: Tensor,
        cfg: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        temperature: Tensor,
        scale: Tensor,
        phi: Tensor,
        positions_L: Tensor,
        up_XL: Tensor,
        down_NX: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One scale of the sampling loop.

        Args:
            label_B: class of each image, int64.
            map_BLZ: f_hat shrunk to this scale; ignored at scale 0, which starts from the class.
            f_hat_BZX: feature map so far.
            uniform_BL: one number in [0, 1) per token.
            cfg: guidance t; scale i uses t·i/(S−1): (1 + t_i)·conditional − t_i·unconditional.
            top_k: int64, 0 keeps all. top_p: 0 keeps all. temperature: divides the guided logits.
            scale: index i, int64. phi: which φ convolution it uses, int64.
            positions_L: the positions of this scale's tokens in the sequence, int64.
            up_XL: bicubic matrix from this scale to f_hat. down_NX: area matrix from f_hat to the next scale.
            past: keys and values of every block in turn, each (2B, H, P, Q); the last B rows are unconditional.

        Returns:
            tokens (B, L) int64, guided logits (B, L, V), f_hat, next map (B, N, Z), then the grown keys and values.
        """
        x_BLD, class_BD, modulation = self.embed(label_B, map_BLZ, scale, positions_L)
        grown: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x_BLD, keys, values = block(x_BLD, modulation, past[2 * i], past[2 * i + 1])
            grown += [keys, values]
        drawn = self.draw(
            x_BLD, class_BD, f_hat_BZX, uniform_BL, cfg, top_k, top_p, temperature, scale, phi, up_XL, down_NX
        )
        return *drawn, *grown


class Decode(nn.Module):
    """f_hat (B, Z, X) → images (B, 3, side, side) in [0, 1]."""

    def __init__(self, vae: VQVAE) -> None:
        super().__init__()
        self.side = vae.config.scales[-1]
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, f_hat_BZX: Tensor) -> tuple[Tensor]:
        """See class."""
        f_hat = f_hat_BZX.unflatten(2, (self.side, self.side))
        return (self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1) * 0.5 + 0.5,)
