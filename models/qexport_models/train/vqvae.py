"""The objective of VAR's multi-scale VQVAE.

    L = L1 + L2 + 0.3 · perceptual  +  mean over scales of ‖f̂_k − sg f‖² + β ‖sg f̂_k − f‖²

f are the encoder's features, f̂_k what the codes of scales 0 … k add up to (VAR, arXiv:2404.02905, algorithm 1), sg
stops gradients. The second part is VQ-VAE's (arXiv:1711.00937, equation 3): it moves codes and φ convolutions to the
features, and the features to the codes. The decoder sees f + sg(f̂ − f): the gradient passes the choice of codes by.

Codes that no position of any scale chose for `RESTART_EVERY` steps are put onto remaining residuals of the last batch.
Codes are chosen in float32 whatever else is computed in: bfloat16 would choose others.

Legend: B batch, C channels, H W sides, V codes, Z latent channels, S scales, N positions of all scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexport_models.featurenet import FeatureNet
from qexport_models.train.data import to_unit
from qexport_models.train.perceptual import reconstruction_loss, reconstruction_terms
from qexport_models.train.task import LOSS, PlainTask
from qexport_models.var.vqvae import VQVAE

COMMITMENT = 0.25
"""β, as in VQ-VAE, section 3.2."""

RESTART_EVERY = 100
"""Steps. At a batch of 256, 4 million positions choose among 4096 codes in that time: a code without any is dead."""


class VQVAETask(PlainTask):
    """See module."""

    def __init__(self, module: VQVAE, net: FeatureNet) -> None:
        self.module, self.net = module, net
        self._hits_V = torch.zeros(module.config.vocab_size, dtype=torch.int64)
        self._last: tuple[Tensor, list[Tensor]] | None = None

    def frozen(self) -> list[nn.Module]:
        """FeatureNet."""
        return [self.net]

    def terms(self, x: Tensor, labels_B: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """See module."""
        del labels_B, rng
        images_BCHW, vae = to_unit(x), self.module
        features_BZHW = vae.encode(images_BCHW).float()
        with torch.autocast(x.device.type, enabled=False):
            target_BZHW = features_BZHW.detach()
            with torch.no_grad():
                tokens = vae.quantize.tokenize(target_BZHW)
            maps = vae.quantize.f_hats(tokens)
            codebook = torch.stack([F.mse_loss(f_hat, target_BZHW) for f_hat in maps]).mean()
            commitment = torch.stack([F.mse_loss(f_hat.detach(), features_BZHW) for f_hat in maps]).mean()
            straight_BZHW = features_BZHW + (maps[-1] - features_BZHW).detach()
        if vae.training:
            self._hits_V += torch.cat(tokens, dim=1).flatten().bincount(minlength=len(self._hits_V)).cpu()
            self._last = target_BZHW, [f_hat.detach() for f_hat in maps]
        # Not `decode`: its clamp would stop the gradient of pixels that are out of range.
        found = reconstruction_terms(self.net, vae.decoder(vae.post_quant_conv(straight_BZHW)), images_BCHW)
        loss = reconstruction_loss(found) + codebook + COMMITMENT * commitment
        return {LOSS: loss, **found, "codebook": codebook}

    def after(self, step: int, rng: torch.Generator) -> None:
        """Restart dead codes where it is time."""
        if (step + 1) % RESTART_EVERY == 0:
            self.restart(rng)

    @torch.no_grad()
    def restart(self, rng: torch.Generator) -> int:
        """Put every code that was not chosen since the last time onto a residual; returns how many.

        The optimiser's moments of such a row need no reset: without gradient for that long they have died away.
        """
        dead_K = (self._hits_V == 0).nonzero()[:, 0]
        self._hits_V.zero_()
        if self._last is None or not len(dead_K):
            return 0
        target_BZHW, maps = self._last
        quantize = self.module.quantize
        rests = [target_BZHW, *(target_BZHW - f_hat for f_hat in maps[:-1])]
        residuals_NZ = torch.cat([quantize.shrink(rest, scale).flatten(0, 1) for scale, rest in enumerate(rests)])
        chosen_K = torch.randint(len(residuals_NZ), (len(dead_K),), generator=rng)
        weight_VZ = quantize.embedding.weight
        weight_VZ[dead_K.to(weight_VZ.device)] = residuals_NZ[chosen_K.to(weight_VZ.device)]
        return len(dead_K)

    def state(self) -> dict[str, Tensor]:
        """How often each code was chosen since the last restart."""
        return {"hits": self._hits_V}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Task`."""
        self._hits_V = state["hits"].clone()
