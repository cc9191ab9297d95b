"""The `decode` graph: tokens to pixels.

Legend: B batch, N = side² tokens, E code width, H W image sides.
"""

from __future__ import annotations

from torch import Tensor, nn

from qexport_models.llamagen.vq import VQ


class Decode(nn.Module):
    """Tokens (B, N) int64 → images (B, 3, H, W) float32 in [0, 1]; holds the decoder's half of the tokeniser only."""

    def __init__(self, vq: VQ, side: int) -> None:
        super().__init__()
        self.side, self.pixels = side, side * vq.config.downsample
        self.quantize = vq.quantize
        self.post_quant_conv, self.decoder = vq.post_quant_conv, vq.decoder

    def forward(self, tokens_BN: Tensor) -> tuple[Tensor]:
        """See class."""
        return (((self.raw(tokens_BN) + 1) * 0.5).clamp(0, 1),)

    def raw(self, tokens_BN: Tensor) -> Tensor:
        """What the original's decoder returns: nominally in [−1, 1], not clamped."""
        codes_BEHW = self.quantize.look_up(tokens_BN).unflatten(-1, (self.side, self.side))
        return self.decoder(self.post_quant_conv(codes_BEHW))
