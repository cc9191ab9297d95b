"""What a draw makes of an error: the continuous error before it, whether the token flips, and what is handed on.

The full-precision model plays; at each call the quantised one sees the same inputs, the cache of keys and values among
them, and the same noise. For every draw:

- `kl`: KL(p ‖ q) of the two guided distributions, nats; `tv`: their total variation ½ Σ |p − q|, the least share of
  flips that any way of drawing from both could have
- `logit_error`: ‖l_q − l‖ / ‖l‖ of the logits with their mean removed, which the softmax does not see
- `flip`: the drawn tokens differ
- `hard`: ‖e(t_q) − e(t)‖², the squared error of the code that is handed on
- `soft`: ‖Σ_v (q_v − p_v) e_v‖², that of the *expected* code: what a model would hand on that did not draw, but passed
  the mean of its prediction as a continuous number. `code`: ‖e(t)‖², `mean`: ‖Σ_v p_v e_v‖², to measure them by

- `race_flip`, `race_hard`: the same of another draw, argmax_v (log p_v + g_v) with Gumbel noise g in common (an
  exponential race). Inverse CDF, as the samplers here draw, shifts every later boundary when one probability moves, so
  tokens flip that have nothing to do with the error; the race moves a token only where relative chances changed.

An error below the gap between two tokens is forgiven entirely (hard = 0), one above it is replaced by the distance of
two codes. Whether that is better on average than handing on the continuous error is the question.

Legend: B images, L tokens of a call, V codes, Z numbers of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qexport.errors import UnsupportedError
from qexport.family import Generator
from qexport.runtime import CallRecord
from qexport.scaling.analysis.draws import COLUMNS, Draws
from qexport.scaling.analysis.subject import subject_of
from qexport.verify.trajectory import label_inputs, labels_for

UNFILTERED = {"top_k": 0, "top_p": 0.0}


def flips(
    full: Generator,
    quantised: Generator,
    *,
    samples: int,
    seed: int = 0,
    batch: int = 10,
    inputs: Mapping[str, Any] | None = None,
) -> Draws:
    """Every draw of `samples` trajectories of the full-precision model; without `inputs` nothing is filtered.

    `tv` and `kl` are of the distributions before filters.

    Raises:
        UnsupportedError: the model draws no tokens, or looks them up in no table that can be found.
    """
    draw = full.draw
    if draw is None:
        raise UnsupportedError(f"{full.entry.name} draws no tokens")
    ours, backend = subject_of(full), subject_of(quantised).player.backend
    labels = labels_for(samples, full.entry.num_classes)
    settings = dict(UNFILTERED if inputs is None else inputs)
    codes_VZ: Tensor | None = None
    calls: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    ports = (draw.logits, draw.tokens)

    def compare(record: CallRecord[Tensor]) -> None:
        nonlocal codes_VZ
        if record.graph != draw.graph:
            return
        found = backend.run(draw.graph, record.feeds, ports)
        logits_BLV = record.results[draw.logits]
        if codes_VZ is None:
            codes_VZ = codebook(full, logits_BLV.shape[-1])
        rows = compare_draws(
            logits_BLV / record.feeds[draw.temperature], found[draw.logits] / record.feeds[draw.temperature],
            record.results[draw.tokens], found[draw.tokens], codes_VZ,
            torch.Generator().manual_seed((seed << 32) + (start << 8) + record.iteration),
        )  # fmt: skip
        for name, column in rows.items():
            columns[name].append(column.double().flatten().numpy())
        images, tokens = logits_BLV.shape[:2]
        calls.append(np.full(images * tokens, record.iteration))
        owners.append(np.repeat(np.arange(start, start + images), tokens))

    for start in range(0, samples, batch):  # `compare` reads `start`
        given = {**settings, **label_inputs(full.plan, labels[start : start + batch])}
        ours.player.play(given, seed=seed, first_index=start, observer=compare, extra_outputs={draw.graph: ports})
    rows = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Draws(np.concatenate(calls), np.concatenate(owners), rows, samples)


def compare_draws(
    logits_BLV: Tensor,
    found_BLV: Tensor,
    tokens_BL: Tensor,
    drawn_BL: Tensor,
    codes_VZ: Tensor,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """The columns of the module, (B, L) each, of draws from two sets of logits; `rng` is for the race."""
    log_p, log_q = torch.log_softmax(logits_BLV, dim=-1), torch.log_softmax(found_BLV, dim=-1)
    p_BLV, q_BLV = log_p.exp(), log_q.exp()
    centred = logits_BLV - logits_BLV.mean(dim=-1, keepdim=True)
    difference = found_BLV - found_BLV.mean(dim=-1, keepdim=True) - centred
    gumbel_BLV = -torch.empty_like(log_p).exponential_(generator=rng).log()
    race_BL, raced_BL = ((log_x + gumbel_BLV).argmax(dim=-1) for log_x in (log_p, log_q))
    hard_BLZ = codes_VZ[drawn_BL] - codes_VZ[tokens_BL]
    return {
        "kl": (p_BLV * (log_p - log_q)).sum(dim=-1).clamp(min=0),
        "tv": 0.5 * (p_BLV - q_BLV).abs().sum(dim=-1),
        "logit_error": difference.norm(dim=-1) / centred.norm(dim=-1),
        "flip": (tokens_BL != drawn_BL).float(),
        "hard": hard_BLZ.square().sum(dim=-1),
        "soft": ((q_BLV - p_BLV) @ codes_VZ).square().sum(dim=-1),
        "code": codes_VZ[tokens_BL].square().sum(dim=-1),
        "mean": (p_BLV @ codes_VZ).square().sum(dim=-1),
        "race_flip": (race_BL != raced_BL).float(),
        "race_hard": (codes_VZ[raced_BL] - codes_VZ[race_BL]).square().sum(dim=-1),
        "race_code": codes_VZ[race_BL].square().sum(dim=-1),
    }


def codebook(generator: Generator, vocabulary: int) -> Tensor:
    """The table (V, Z) in which the drawing graph looks its tokens up: its embedding with one row a token.

    Raises:
        UnsupportedError: there is not exactly one such table.
    """
    assert generator.draw is not None
    parts = generator.graph(generator.draw.graph).all_parts
    tables = {
        id(inner.weight): inner.weight
        for part in parts
        for module in part.modules
        for inner in module.modules()
        if isinstance(inner, nn.Embedding) and inner.num_embeddings == vocabulary
    }
    if len(tables) != 1:
        raise UnsupportedError(f"{generator.entry.name}: {len(tables)} tables with {vocabulary} rows; one is needed")
    return next(iter(tables.values())).detach()
