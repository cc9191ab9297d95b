"""The Inception Score from the network's logits, with a 95 % bootstrap interval.

IS = exp(mean KL(p(y|x) ‖ p(y))), the marginal p(y) taken over a tenth of the images, averaged over the tenths
(Salimans et al. 2016). It is biased downwards with n, and a resample, which repeats images, more so; the interval is
therefore the spread of the resamples, laid around the estimate.

Legend: N images, C classes, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.verify.fd import RESAMPLES, Z_95

SPLITS = 10
"""Parts of the Inception Score, as it was published and has been reported since."""

SHUFFLE_SEED = 2020
"""torch-fidelity's default. Parts would differ by class where files lie in order of class; with the same order as
torch-fidelity's, the figure is the same too."""


@dataclass(frozen=True)
class InceptionScore:
    """Mean `value` over `splits` parts and their standard `deviation`; 95 % interval `low` … `high`."""

    value: float
    deviation: float
    low: float
    high: float
    splits: int
    images: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "value": self.value, "deviation": self.deviation, "ci95": [self.low, self.high], "splits": self.splits,
            "n": self.images,
        }  # fmt: skip


def inception_score(logits_NC: np.ndarray, splits: int, seed: int) -> InceptionScore:
    """The Inception Score.

    Args:
        logits_NC: of the generated images, without bias.
        splits: parts that the marginal is taken over, see the module.
        seed: of the bootstrap, which resamples within parts.

    Raises:
        InputError: fewer than two images for each part, or logits that are not finite.
    """
    count = len(logits_NC)
    if splits < 1 or count < 2 * splits:
        raise InputError(
            f"IS in {splits} parts needs at least {2 * max(splits, 1)} images, not {count}; pass --splits 1"
        )
    if not np.isfinite(logits_NC).all():
        raise InputError("Inception's logits are not finite; the weights are damaged")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    generator = np.random.default_rng(seed)
    scores, resampled_R = [], np.zeros(RESAMPLES)
    for i in range(splits):
        part_NC = logits_NC[order[i * count // splits : (i + 1) * count // splits]].astype(np.float64)
        log_NC = part_NC - part_NC.max(axis=1, keepdims=True)
        log_NC -= np.log(np.exp(log_NC).sum(axis=1, keepdims=True))
        p_NC = np.exp(log_NC)
        ones = np.ones((1, len(p_NC)))
        scores.append(float(_scores(ones, p_NC, log_NC)[0]))
        chances = np.full(len(p_NC), 1 / len(p_NC))
        resampled_R += _scores(generator.multinomial(len(p_NC), chances, RESAMPLES), p_NC, log_NC) / splits
    value, spread = float(np.mean(scores)), Z_95 * float(np.std(resampled_R, ddof=1))
    # 1 is the least there is: all images alike.
    return InceptionScore(value, float(np.std(scores)), max(value - spread, 1.0), value + spread, splits, count)


def _scores(counts_RN: np.ndarray, p_NC: np.ndarray, log_NC: np.ndarray) -> np.ndarray:
    """exp(mean Σ p log p − Σ q log q) (R,), where image i counts `counts_RN[:, i]` times and q is the mean of p."""
    share_RN = counts_RN / len(p_NC)
    q_RC = share_RN @ p_NC
    own_R = share_RN @ (p_NC * log_NC).sum(axis=1)
    marginal_R = (q_RC * np.log(np.where(q_RC > 0, q_RC, 1))).sum(axis=1)
    return np.exp(own_R - marginal_R)
