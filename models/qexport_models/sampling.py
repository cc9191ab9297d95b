"""The sampler that VAR and LlamaGen share: temperature, top-k, top-p, and one uniform number per token.

Everything is a pure function of tensors, written so that `torch.onnx.export` turns it into standard ONNX: no random
numbers inside, no Python branch on a tensor, batch and token count free, only the vocabulary fixed.

Legend of shape suffixes: B batch, L tokens, V vocabulary, K the k best logits in descending order, N × M the V
entries of a row as N blocks of M. Logits and probabilities are float32, tokens int64.

**Filtering** ends in one threshold per row: a token stays when its logit ≥ the smallest logit that both filters keep.

- temperature divides first, and is never taken below `MIN_TEMPERATURE`;
- top-k keeps the k best; ``top_k <= 0`` is off, ``top_k > V`` is V;
- top-p then keeps, of what is left and renormalised, the shortest run of best tokens whose mass reaches ``top_p``:
  a token stays when the mass *before* it is < top_p, so the best one always stays (Holtzman et al. 2020). VAR removes,
  ascending, what has cumulative mass ≤ 1 − top_p; LlamaGen removes, descending, what has more than top_p before it.
  These are the same set except where a cumulative mass equals top_p exactly (then LlamaGen keeps one more).
  ``top_p <= 0`` and ``top_p >= 1`` are off (VAR's convention; LlamaGen's own 0 would mean greedy: use ``top_k = 1``).

Tokens whose logit *equals* the threshold all stay, as in both originals' top-k; their top-p lets the order of the sort
decide among equals.

**Drawing** is the inverse of the cumulative distribution in vocabulary order, at u · total. A running sum over V
entries would collect V rounding errors and, on ONNX Runtime's CUDA provider, cost O(V²) a row, so both places that
need one (the draw, and top-p, which is the same search in sorted order at top_p · total) do it in two levels: find the
block, then search inside that block only. Both running sums are about √V long. They must be monotone, which holds for
a sequential sum of non-negative numbers (torch on CPU; ONNX Runtime on CPU and CUDA).

Sums are float32 in ONNX Runtime; torch on CPU carries its running sums in float64. A token can therefore differ only
where u · total lies within that rounding (about 1e-6 · total) of a boundary between tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

MIN_TEMPERATURE = 1e-5
"""LlamaGen's floor; logits of magnitude 100 still stay far inside float32 after the division."""

_Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.compiler.assume_constant_result
def block_size(vocab_size: int) -> int:
    """The divisor M of `vocab_size` nearest to its square root, the larger of two equally near ones.

    A prime vocabulary gives 1 or itself: still right, only slower.
    """
    divisors = (m for m in range(1, vocab_size + 1) if vocab_size % m == 0)
    return min(divisors, key=lambda m: (abs(m - vocab_size**0.5), -m))


def filter_logits(
    logits_BLV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, temperature: torch.Tensor
) -> torch.Tensor:
    """Divide by the temperature and set what top-k and top-p remove to −inf.

    Args:
        logits_BLV: guided logits, float32, finite.
        top_k: int64 scalar; ≤ 0 is off.
        top_p: float32 scalar; ≤ 0 and ≥ 1 are off.
        temperature: float32 scalar.

    Returns:
        Float32 (B, L, V). Each row keeps at least one finite entry.
    """
    scaled_BLV = _scale(logits_BLV, temperature)
    return torch.where(_keep(scaled_BLV, top_k, top_p), scaled_BLV, -torch.inf)


def draw_tokens(
    logits_BLV: torch.Tensor,
    uniform_BL: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    temperature: torch.Tensor,
) -> torch.Tensor:
    """Draw one token per row from the filtered distribution, by inverse CDF in vocabulary order.

    Args:
        logits_BLV: guided logits, float32, finite.
        uniform_BL: float32 in [0, 1), one number per token.
        top_k: int64 scalar; ≤ 0 is off, 1 is greedy.
        top_p: float32 scalar; ≤ 0 and ≥ 1 are off.
        temperature: float32 scalar.

    Returns:
        Tokens, int64 (B, L). A token that the filters removed, or whose probability is 0, is never drawn.
    """
    scaled_BLV = _scale(logits_BLV, temperature)
    keep_BLV = _keep(scaled_BLV, top_k, top_p)
    largest_BL1 = scaled_BLV.amax(-1, keepdim=True)
    # `where` after `exp`: a runtime's fast exp(−inf) need not be exactly 0.
    mass_BLV = torch.where(keep_BLV, torch.exp(scaled_BLV - largest_BL1), 0.0)
    return _search(mass_BLV, uniform_BL, torch.le)


def _scale(logits_BLV: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    return logits_BLV / temperature.clamp(min=MIN_TEMPERATURE)


def _keep(logits_BLV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Bool (B, L, V): which entries stay."""
    vocab_size = logits_BLV.shape[-1]
    k_on = top_k > 0
    p_on = (top_p > 0) & (top_p < 1)
    # How many values must be sorted: with both filters off, none (TopK wants at least one).
    k = cast(int, torch.where(k_on, top_k.clamp(max=vocab_size), torch.where(p_on, vocab_size, 1)).item())
    torch._check(k >= 1)
    torch._check(k <= vocab_size)
    best_BLK = torch.topk(logits_BLV, k, dim=-1, largest=True, sorted=True).values
    k_threshold_BL1 = torch.where(k_on, best_BLK[..., -1:], -torch.inf)

    mass_BLK = torch.exp(best_BLK - best_BLK[..., :1])
    mass_BLV = torch.nn.functional.pad(mass_BLK, (0, vocab_size - k))
    last_BL = _search(mass_BLV, top_p.expand(logits_BLV.shape[:-1]), torch.lt)
    p_threshold_BL1 = torch.gather(best_BLK, -1, last_BL.unsqueeze(-1))
    return logits_BLV >= torch.where(p_on, p_threshold_BL1, k_threshold_BL1)


def _search(mass_BLV: torch.Tensor, fraction_BL: torch.Tensor, before: _Compare) -> torch.Tensor:
    """Index of the first entry at which the running sum of `mass_BLV` is no longer `before` fraction · total.

    With `torch.le` that is the first running sum > target (a draw from u in [0, 1)), with `torch.lt` the first ≥
    target (the last member of a nucleus). The second condition, running sum < total, catches a target that rounding
    has pushed to the total: the search then ends at the last entry that still added mass, never on a zero.
    """
    vocab_size = mass_BLV.shape[-1]
    M = block_size(vocab_size)
    mass_BLNM = mass_BLV.unflatten(-1, (vocab_size // M, M))

    edge_BLN = torch.cumsum(mass_BLNM.sum(-1), dim=-1)
    total_BL1 = edge_BLN[..., -1:]
    target_BL1 = fraction_BL.unsqueeze(-1) * total_BL1
    passed_BLN = before(edge_BLN, target_BL1) & (edge_BLN < total_BL1)
    block_BL1 = passed_BLN.sum(-1, keepdim=True)

    # The edge before block 0 is 0; max is exact and needs no gather at index −1.
    start_BL1 = torch.where(passed_BLN, edge_BLN, 0.0).amax(-1, keepdim=True)
    inside_BLM = torch.gather(mass_BLNM, -2, block_BL1.unsqueeze(-1).expand(-1, -1, -1, M)).squeeze(-2)
    edge_BLM = torch.cumsum(inside_BLM, dim=-1)
    passed_BLM = before(edge_BLM, target_BL1 - start_BL1) & (edge_BLM < edge_BLM[..., -1:])
    return block_BL1.squeeze(-1) * M + passed_BLM.sum(-1)
