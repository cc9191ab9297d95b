"""How far two arrays, two sets of predictions or two clouds of features are apart.

Everything is accumulated in float64, chunk by chunk, so that the memory stays bounded and a mean over 10⁸ numbers is
good to its last printed digit. A NaN in what is compared becomes the result, which then passes no limit: a graph that
computes nonsense fails its check instead of crashing it. There is no cosine similarity: it is blind to scale.

Shape suffixes: N positions (any number of leading axes), V vocabulary, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from qexport.errors import InputError

_CHUNK_VALUES = 1 << 20  # 8 MiB as float64, a few times over: beyond, larger chunks are no faster

_DOT_VALUES = 1 << 13
"""64 KiB as float64. OpenBLAS wakes threads for dot products beyond 10,000 numbers, which cost three times as much."""

_SEMIDEFINITE_TOLERANCE = 1e-6
"""How far below zero, relative to the greatest, an eigenvalue may lie that stands for zero.

Covariances of float32 features carry relative errors around 1e-7; a truly indefinite matrix is not this close.
"""


def relative_l2(a: npt.ArrayLike, ref: npt.ArrayLike) -> float:
    """‖a − ref‖₂ / ‖ref‖₂ over all elements; 0 if both are zero, infinity if only `ref` is.

    Raises:
        InputError: the shapes differ.
    """
    x, y = np.asarray(a), np.asarray(ref)
    if x.shape != y.shape:
        raise InputError(f"cannot compare shape {x.shape} with reference shape {y.shape}")
    x, y = x.reshape(-1), y.reshape(-1)
    error = power = 0.0
    with np.errstate(invalid="ignore"):  # infinity minus infinity is the NaN that is reported
        for start in range(0, x.size, _DOT_VALUES):
            part = y[start : start + _DOT_VALUES].astype(np.float64)
            power += float(part @ part)
            part -= x[start : start + _DOT_VALUES]
            error += float(part @ part)
    if error == 0:
        return 0.0
    if power == 0:
        return math.nan if math.isnan(error) else math.inf
    return math.sqrt(error) / math.sqrt(power)


def sqnr_db(a: npt.ArrayLike, ref: npt.ArrayLike) -> float:
    """Signal to quantisation noise, 10·log₁₀(‖ref‖² / ‖a − ref‖²) in dB; infinity if they are equal.

    Raises:
        InputError: the shapes differ.
    """
    error = relative_l2(a, ref)
    return math.inf if error == 0 else -20 * math.log10(error)


def kl_divergence(logits_p: npt.ArrayLike, logits_q: npt.ArrayLike) -> float:
    """Mean over positions of KL(p‖q) = Σ_v p_v (log p_v − log q_v) in nats, with p, q = softmax of logits (..., V).

    −∞ logits are probabilities of zero: they add nothing where p has them, and give ∞ where only q has. Rounding can
    make the sum of one position slightly negative, which it cannot be; it then counts as 0.

    Raises:
        InputError: the shapes differ, or there is no position.
    """
    total = 0.0
    p_NV, q_NV = _pair(logits_p, logits_q)
    with np.errstate(invalid="ignore", divide="ignore"):
        for rows in _chunks(p_NV):
            log_p, log_q = _log_softmax(p_NV[rows]), _log_softmax(q_NV[rows])
            p = np.exp(log_p)
            # Compared with 0 and not by p > 0, which would also drop a NaN.
            terms = np.where(p == 0, 0.0, p * (log_p - log_q))
            total += float(np.maximum(terms.sum(axis=-1), 0.0).sum())
    return total / len(p_NV)


def top1_agreement(logits_p: npt.ArrayLike, logits_q: npt.ArrayLike) -> float:
    """Share of positions at which both logits (..., V) have their greatest entry in the same place; first wins a tie.

    Raises:
        InputError: the shapes differ, or there is no position.
    """
    p_NV, q_NV = _pair(logits_p, logits_q)
    hits = 0
    for rows in _chunks(p_NV):
        p, q = p_NV[rows], q_NV[rows]
        if np.isnan(p).any() or np.isnan(q).any():
            return math.nan
        hits += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    return hits / len(p_NV)


def topk_agreement(logits_p: npt.ArrayLike, logits_q: npt.ArrayLike, k: int) -> float:
    """Mean over positions of |top-k(p) ∩ top-k(q)| / k, logits (..., V); at a tie, the lower index belongs to the top.

    Raises:
        InputError: the shapes differ, there is no position, or k is not within 1 … V.
    """
    p_NV, q_NV = _pair(logits_p, logits_q)
    if not 1 <= k <= p_NV.shape[1]:
        raise InputError(f"k is {k}; it must lie within 1 and the vocabulary's {p_NV.shape[1]}")
    hits = 0
    for rows in _chunks(p_NV):
        p, q = p_NV[rows], q_NV[rows]
        if np.isnan(p).any() or np.isnan(q).any():
            return math.nan
        hits += int((_topk_mask(p, k) & _topk_mask(q, k)).sum())
    return hits / (k * len(p_NV))


def cross_entropy(logits: npt.ArrayLike, tokens: npt.ArrayLike) -> float:
    """Mean over positions of −log softmax(logits)[token] in nats; logits (..., V), tokens (...) integer.

    Raises:
        InputError: the shapes do not fit, there is no position, or a token lies outside 0 … V − 1.
    """
    x, index = np.asarray(logits), np.asarray(tokens)
    if x.ndim < 1 or x.shape[:-1] != index.shape or not x.size:
        raise InputError(f"logits {x.shape} and tokens {index.shape} do not fit; they must be (..., V) and (...)")
    if index.dtype.kind not in "iu":
        raise InputError(f"tokens are {index.dtype}; they must be integers")
    x_NV, index_N = x.reshape(-1, x.shape[-1]), index.reshape(-1)
    if index_N.min() < 0 or index_N.max() >= x_NV.shape[1]:
        raise InputError(
            f"tokens reach from {index_N.min()} to {index_N.max()}; the vocabulary is 0 to {x_NV.shape[1] - 1}"
        )
    total = 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        for rows in _chunks(x_NV):
            total -= float(np.take_along_axis(_log_softmax(x_NV[rows]), index_N[rows][:, None], axis=-1).sum())
    return total / len(x_NV)


def frechet_distance(mu1: npt.ArrayLike, cov1: npt.ArrayLike, mu2: npt.ArrayLike, cov2: npt.ArrayLike) -> float:
    """‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½) of two normal distributions; means (D,), covariances (D, D), float64.

    C₁C₂ has the eigenvalues of the symmetric C₁^½ C₂ C₁^½, so the trace of its root is the sum of their roots. That
    needs no general matrix root, which for singular covariances (fewer images than features) is ill-conditioned and
    comes out complex.

    Raises:
        InputError: shapes that do not fit, or a covariance that is not symmetric positive semidefinite.
    """
    m1, m2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    c1, c2 = np.asarray(cov1, np.float64), np.asarray(cov2, np.float64)
    if m1.ndim != 1 or m2.shape != m1.shape or c1.shape != (m1.size, m1.size) or c2.shape != c1.shape:
        raise InputError(f"means {m1.shape}, {m2.shape} and covariances {c1.shape}, {c2.shape} do not fit together")
    if not all(np.isfinite(x).all() for x in (m1, m2, c1, c2)):
        return math.nan
    values1, vectors1 = _eigh("first", c1)
    _eigh("second", c2)
    root1 = (vectors1 * np.sqrt(values1)) @ vectors1.T
    product = root1 @ c2 @ root1
    # Symmetric but for rounding; the product of semidefinite matrices' negative eigenvalues are rounding too.
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = float((m1 - m2) @ (m1 - m2) + np.trace(c1) + np.trace(c2) - 2 * cross)
    return max(distance, 0.0)


def _eigh(which: str, cov: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    size = float(np.abs(cov).max(initial=0.0))
    if np.abs(cov - cov.T).max(initial=0.0) > _SEMIDEFINITE_TOLERANCE * size:
        raise InputError(f"the {which} covariance is not symmetric")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values.size and values[0] < -_SEMIDEFINITE_TOLERANCE * values[-1]:
        raise InputError(f"the {which} covariance is not positive semidefinite: eigenvalue {values[0]:.3g}")
    return np.maximum(values, 0), vectors


def _pair(p: npt.ArrayLike, q: npt.ArrayLike) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """Both as (N, V), without a copy where the layout allows."""
    x, y = np.asarray(p), np.asarray(q)
    if x.shape != y.shape or x.ndim < 1 or not x.size:
        raise InputError(f"cannot compare logits of shapes {x.shape} and {y.shape}; they must be equal, (..., V)")
    return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])


def _chunks(x_NV: npt.NDArray[np.floating]) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // x_NV.shape[1])
    return (slice(start, start + step) for start in range(0, len(x_NV), step))


def _log_softmax(x_NV: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    shifted = x_NV.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _topk_mask(x_NV: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.bool_]:
    threshold = np.partition(x_NV, -k, axis=-1)[:, -k, None]
    above, equal = x_NV > threshold, x_NV == threshold
    room = k - above.sum(axis=-1, keepdims=True)
    return above | (equal & (np.cumsum(equal, axis=-1) <= room))
