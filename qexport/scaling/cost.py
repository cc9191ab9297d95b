"""What a run costs: bits of all parameters of the generator, and bits of weights that its products read.

*Total bits* are those of every parameter that the generator's graphs hold, as `qexport.totals` counts them: codes,
scales, what stays in fp16 and fp32. The decoder, the same for every size, is left out; ``*_with_decoder`` has it. Bits
are counted as information (a 3-bit integer is 3) and as stored (it lies in 4). *Matrix bits* are the part of the
matrices that the presets quantise: of the small reference models other parameters are more than half, of the published
ones next to nothing.

*Compute bits* are Σ over layers of MACs · bits, for one image sampled as the plan does by default (its steps, both
branches of guidance). MACs of a layer are rows that flow into it · inputs · outputs; bits are the format's information
bits, 16 where nothing is quantised, scales not counted. Products of activations (attention) have no weights and are
left out, as are embeddings and convolutions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from qexport.family import Generator
from qexport.formats import get_format
from qexport.reference import Interception, Window, layer_weights, torch_player
from qexport.totals import FP16_BITS, totals
from qexport.verify.trajectory import label_inputs, labels_for


def count_macs(generator: Generator) -> dict[str, int]:
    """MACs of each of the generator's matrices while one image is sampled, counted by sampling one."""
    weights = {name: weight for name, weight in layer_weights(generator).items() if name in generator.layers}
    found: Counter[str] = Counter()

    def visit(name: str, x: Tensor, window: Window | None) -> Tensor:
        found[name] += x.numel() // x.shape[-1] * weights[name].numel()
        return x

    with Interception(weights, visit):
        torch_player(generator).play(label_inputs(generator.plan, labels_for(1, generator.entry.num_classes)), seed=0)
    return dict(found)


def cost_of(generator: Generator, rows: Sequence[Mapping[str, Any]], macs: Mapping[str, int]) -> dict[str, float]:
    """Sums of `qexport.totals.layer_row` rows of all parameters; see module."""
    decoder = generator.plan.calls[-1].graph
    own = [row for row in rows if row["graph"] != decoder]
    matrices = [
        row for row in own if row["layer"] and any(fnmatchcase(row["name"], p) for p in generator.default_layers)
    ]
    summed = totals(own)
    bits = {
        row["name"]: get_format(row["format"]).information_bits if row["algorithm"] else float(FP16_BITS)
        for row in rows
    }
    return {
        "parameters": sum(map(_count, own)),
        "total_bits": _information_bits(own),
        "stored_bits": _stored_bits(own),
        "total_bits_with_decoder": _information_bits(rows),
        "stored_bits_with_decoder": _stored_bits(rows),
        "matrix_weights": sum(map(_count, matrices)),
        "matrix_bits": _information_bits(matrices),
        "bits_per_weight": summed["bits_per_weight_quantized"] or float(FP16_BITS),
        "information_bits_per_weight": summed["information_bits_per_weight_quantized"] or float(FP16_BITS),
        "macs": sum(macs.values()),
        "compute_bits": sum(count * bits[name] for name, count in macs.items()),
    }


def _count(row: Mapping[str, Any]) -> int:
    return math.prod(row["shape"])


def _information_bits(rows: Iterable[Mapping[str, Any]]) -> int:
    return round(sum(_count(row) * row["bits_information"] for row in rows))


def _stored_bits(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(row["size_bytes"]) for row in rows) * 8
