"""Is another token excused by rounding? A judgement in float64 NumPy that shares no code with the sampler.

What is judged. The reference has guided logits l (V numbers) and drew a token by: x = l / temperature; keep the k
greatest; keep of those the shortest run of best ones whose mass reaches top_p; w = exp(x) of what is kept; the token is
the first t in vocabulary order with C(t) > u · C(V−1), where C is the running sum of w. The other side did the same
with logits l′, of which is known that |l′ − l| ≤ δ.

Bounds. Let ε = δ / temperature + 2 · 2⁻²⁴ · max|x|: the second term covers both sides' division in float32 and the
subtraction of the maximum. Then for the other side:

- Order statistics move by at most the greatest change of any entry, so x′₍ₖ₎, the k-th greatest, lies within ± ε of
  x₍ₖ₎. Every v with x_v < x₍ₖ₎ − 2ε is removed for certain. One of the k best can only be displaced by an entry beyond
  them, so every v with x_v > x₍ₖ₊₁₎ + 2ε is kept for certain.
- The mass of the j best among the k best, P_j of P_j + R_j, changes by factors within e^±ε in P_j and in R_j. The share
  thus lies in [P e^−ε / (P e^−ε + R e^ε), P e^ε / (P e^ε + R e^−ε)], widened by the summation allowance s. The first
  and the last rank at which it can reach top_p take the place of k in these bounds.
- So the kept set K′ satisfies K_min ⊆ K′ ⊆ K_max. With A(t) the mass of K up to t and B(t) the mass after it, the share
  F′(t) = A′/(A′ + B′) grows with A′ and falls with B′, so it lies between
  A_min e^−ε / (A_min e^−ε + B_max e^ε) and A_max e^ε / (A_max e^ε + B_min e^−ε).
- t can be drawn iff t ∈ K_max and F_low(t − 1) − s ≤ u ≤ F_high(t) + s.

Summation allowance. The running sums are float32 sums of non-negative numbers in two levels of about √V terms each (see
`DrawSpec`'s users: anything else costs O(V²) on CUDA). A float32 sum of n non-negative terms has a relative error of at
most n · 2⁻²⁴; target and running sum have one each, and exp is good to about 4 units, u · total to one. Hence
s = 2 · (2⌈√V⌉ + 8) · 2⁻²⁴: 1.6e-5 of the mass for V = 4096.

With δ = 0 the same judgement says whether the reference's own token is right.

Shape suffixes: R rows (draws), V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""

_EXP_AND_PRODUCT_UNITS = 8
"""Rounding of exp (≤ 4 units), of u · total and of the differences of running sums, in units of `UNIT_ROUNDOFF`."""

_CHUNK_VALUES = 1 << 21
"""Rows are judged in chunks of this many float64 values: 16 MiB, a few times over."""

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sampling:
    """The sampler's settings: `top_k` ≤ 0 and `top_p` outside (0, 1) are off."""

    top_k: int
    top_p: float
    temperature: float


def summation_allowance(vocab_size: int) -> float:
    """s of the module: how far rounding may move a share of the mass."""
    return 2 * (2 * math.ceil(math.sqrt(vocab_size)) + _EXP_AND_PRODUCT_UNITS) * UNIT_ROUNDOFF


def can_be_drawn(
    logits_RV: npt.ArrayLike,
    uniform_R: npt.ArrayLike,
    tokens_R: npt.ArrayLike,
    sampling: Sampling,
    logit_error_R: npt.ArrayLike = 0.0,
) -> Bools:
    """Whether each token is one that could be drawn from logits within `logit_error_R` of the reference's.

    Args:
        logits_RV: the reference's guided, unfiltered logits.
        uniform_R: the number in [0, 1) that decided each draw.
        tokens_R: the tokens to be judged.
        sampling: settings of the sampler.
        logit_error_R: δ, greatest absolute difference of a logit in the row; one number or one a row.

    Returns:
        bool (R,). A row whose logits or error are not finite is False.
    """
    x_RV = np.asarray(logits_RV)
    rows, vocab_size = x_RV.shape
    uniform = np.asarray(uniform_R, np.float64)
    tokens = np.asarray(tokens_R)
    error = np.broadcast_to(np.asarray(logit_error_R, np.float64), rows)
    verdict = np.zeros(rows, np.bool_)
    step = max(1, _CHUNK_VALUES // vocab_size)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        verdict[part] = _judge(x_RV[part].astype(np.float64), uniform[part], tokens[part], sampling, error[part])
    return verdict


def _judge(logits_RV: Float64, u_R: Float64, t_R: np.ndarray, sampling: Sampling, delta_R: Float64) -> Bools:
    good_R = np.isfinite(logits_RV).all(-1) & np.isfinite(delta_R) & (t_R >= 0) & (t_R < logits_RV.shape[1])
    x_RV = np.where(good_R[:, None], logits_RV, 0.0) / sampling.temperature
    t_R = np.where(good_R, t_R, 0)
    delta_R = np.where(good_R, delta_R, 0.0)
    epsilon_R1 = (delta_R / sampling.temperature + 2 * UNIT_ROUNDOFF * np.abs(x_RV).max(-1))[:, None]
    allowance = summation_allowance(x_RV.shape[1])
    high_R1, low_R1 = _thresholds(x_RV, sampling, epsilon_R1, allowance)
    w_RV = np.exp(x_RV - x_RV.max(-1, keepdims=True))
    surely_RV, maybe_RV = x_RV > high_R1, x_RV >= low_R1
    surely_RV |= x_RV == x_RV.max(-1, keepdims=True)  # the best always stays

    rows = np.arange(len(x_RV))
    upto_RV = np.arange(x_RV.shape[1]) <= t_R[:, None]
    at_most = np.where(maybe_RV, w_RV, 0.0)
    at_least = np.where(surely_RV, w_RV, 0.0)
    a_most, a_least = (at_most * upto_RV).sum(-1), (at_least * upto_RV).sum(-1)
    b_most, b_least = at_most.sum(-1) - a_most, at_least.sum(-1) - a_least
    before_least = a_least - at_least[rows, t_R]
    after_most = b_most + at_most[rows, t_R]
    epsilon_R = epsilon_R1[:, 0]
    lower_R = _share(before_least, after_most, -epsilon_R) - allowance
    upper_R = _share(a_most, np.maximum(b_least, 0.0), epsilon_R) + allowance
    return good_R & maybe_RV[rows, t_R] & (lower_R <= u_R) & (u_R <= upper_R)


def _thresholds(x_RV: Float64, sampling: Sampling, epsilon_R1: Float64, allowance: float) -> tuple[Float64, Float64]:
    """What x must exceed to be kept for certain, and reach to be kept at all, (R, 1) each."""
    vocab_size = x_RV.shape[1]
    nucleus = 0 < sampling.top_p < 1
    k = vocab_size if sampling.top_k <= 0 else min(sampling.top_k, vocab_size)
    descending_RV = -np.sort(-x_RV, axis=-1)
    first_R1 = last_R1 = np.full((len(x_RV), 1), k - 1)
    if nucleus:
        best_RK = descending_RV[:, :k]
        running_RK = np.cumsum(np.exp(best_RK - best_RK[:, :1]), axis=-1)
        rest_RK = np.maximum(running_RK[:, -1:] - running_RK, 0.0)
        least_RK = _share(running_RK, rest_RK, -epsilon_R1) - allowance
        most_RK = _share(running_RK, rest_RK, epsilon_R1) + allowance
        reached_RK = least_RK >= sampling.top_p
        first_R1 = (most_RK >= sampling.top_p).argmax(-1)[:, None]
        last_R1 = np.where(reached_RK.any(-1), reached_RK.argmax(-1), k - 1)[:, None]
    lowest = np.full((len(x_RV), 1), -np.inf)  # beyond the last there is nothing that could displace it
    beyond_R1 = np.take_along_axis(np.concatenate((descending_RV, lowest), axis=1), first_R1 + 1, axis=-1)
    return beyond_R1 + 2 * epsilon_R1, np.take_along_axis(descending_RV, last_R1, axis=-1) - 2 * epsilon_R1


def _share(part: Float64, rest: Float64, epsilon: Float64) -> Float64:
    """part · e^ε of part · e^ε + rest · e^−ε."""
    grown, shrunk = part * np.exp(epsilon), rest * np.exp(-epsilon)
    return grown / (grown + shrunk)
