"""A codebook of latents by k-means, and putting latents onto it: the discrete space that a diffusion model lacks.

A code stands for the C channels of one latent pixel. Lloyd's algorithm from randomly chosen vectors; a code that
nothing is nearest to moves onto a random vector.

Legend: N vectors, K codes, B images, C latent channels, H W latent side.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 15
"""Of Lloyd's algorithm; on latents the distortion changes by less than a percent afterwards."""

_CHUNK = 1 << 14
"""Vectors whose distances are held at a time."""


class Codebook:
    """Codes (K, C)."""

    def __init__(self, codes_KC: Tensor) -> None:
        self.codes_KC = codes_KC

    @classmethod
    def of_latents(cls, latents_BCHW: Tensor, count: int, seed: int = 0) -> Codebook:
        """k-means over all pixels of latents; `count` of them at least are needed."""
        x_NC = _vectors(latents_BCHW)
        rng = torch.Generator().manual_seed(seed)
        book = cls(x_NC[torch.randperm(len(x_NC), generator=rng)[:count]].clone())
        for _ in range(ITERATIONS):
            nearest_N = book._nearest(x_NC)
            hits_K = nearest_N.bincount(minlength=count)
            sums_KC = torch.zeros_like(book.codes_KC).index_add_(0, nearest_N, x_NC)
            others_KC = x_NC[torch.randint(len(x_NC), (count,), generator=rng)]
            means_KC = sums_KC / hits_K.clamp(min=1)[:, None]
            book = cls(torch.where((hits_K > 0)[:, None], means_KC, others_KC))
        return book

    def indices(self, latents_BCHW: Tensor) -> Tensor:
        """Index of the nearest code of every pixel, (B, H, W) int64."""
        batch, _, height, width = latents_BCHW.shape
        return self._nearest(_vectors(latents_BCHW)).reshape(batch, height, width)

    def snap(self, latents_BCHW: Tensor) -> Tensor:
        """Every pixel's nearest code, (B, C, H, W)."""
        return self.codes_KC[self.indices(latents_BCHW)].permute(0, 3, 1, 2).contiguous()

    def distortion(self, latents_BCHW: Tensor) -> float:
        """‖snap(x) − x‖ / ‖x‖."""
        return float((self.snap(latents_BCHW) - latents_BCHW).norm() / latents_BCHW.norm())

    def _nearest(self, x_NC: Tensor) -> Tensor:
        power_K = self.codes_KC.square().sum(dim=1)
        parts = x_NC.split(_CHUNK)
        return torch.cat([(power_K - 2 * part @ self.codes_KC.T).argmin(dim=1) for part in parts])


def _vectors(latents_BCHW: Tensor) -> Tensor:
    return latents_BCHW.permute(0, 2, 3, 1).reshape(-1, latents_BCHW.shape[1])
