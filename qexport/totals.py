"""What a bundle costs: one row a weight, and the sums. Bits are counted with scales and with what stays in fp16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import StoredWeight, rounds_output
from qexport.scheme import PerGroup

FP16_BITS = 16


def layer_row(weight: StoredWeight) -> dict[str, Any]:
    """The row of one parameter.

    `bits_stored` and `bits_information` are per weight, scales included; `sqnr_db` is 10·log10 of signal over
    quantisation noise power, None where nothing was quantised. A layer with quantised activations has
    `activation_format` and `activation_scales`, one whose output is rounded `output_format`, one whose input is
    smoothed `smooth`, one with scales whose weights are all zero `zero_groups`: how many of how many.
    """
    value = weight.value
    row: dict[str, Any] = {
        "layer": weight.layer is not None,
        "name": weight.layer or weight.name,
        "graph": weight.graph,
    }
    if isinstance(value, QuantizedTensor):
        granularity = value.spec.granularity
        return row | {
            "shape": list(weight.original.shape),
            "format": value.spec.format.name,
            "granularity": str(granularity),
            "group_size": granularity.size if isinstance(granularity, PerGroup) else None,
            "algorithm": weight.rule.algorithm if weight.rule else None,
            "bits_stored": round(value.bits_per_weight, 6),
            "bits_information": round(value.information_bits_per_weight, 6),
            "size_bytes": value.bits // 8,
            "sqnr_db": round(cast(float, weight.sqnr_db), 3),
            **_zero_groups(weight.original, value),
            **_inputs(weight),
        }
    bits = value.dtype.itemsize * 8
    return row | {
        "shape": list(value.shape),
        "format": value.dtype.name,
        "granularity": None,
        "group_size": None,
        "algorithm": None,
        "bits_stored": float(bits),
        "bits_information": float(bits),
        "size_bytes": value.nbytes,
        "sqnr_db": None,
    }


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over all parameters.

    `bits_per_weight` is over the quantised matrices, `bits_per_weight_all` over every parameter that the graphs hold.
    `compression_quantized` and `compression_all` are the stored bytes as a share of the same parameters in fp16.
    """
    quantized = [row for row in rows if row["algorithm"]]
    out: dict[str, Any] = {"layers_quantized": len(quantized), "layers": sum(bool(row["layer"]) for row in rows)}
    for name, part in (("quantized", quantized), ("all", rows)):
        weights = sum(_count(row) for row in part)
        size = sum(int(row["size_bytes"]) for row in part)
        information = sum(_count(row) * row["bits_information"] for row in part)
        out[f"weights_{name}"] = weights
        out[f"size_bytes_{name}"] = size
        out[f"bits_per_weight_{name}"] = round(size * 8 / weights, 6) if weights else None
        out[f"information_bits_per_weight_{name}"] = round(information / weights, 6) if weights else None
        out[f"share_of_fp16_{name}"] = round(size * 8 / (weights * FP16_BITS), 6) if weights else None
    return out


def _zero_groups(original: np.ndarray, value: QuantizedTensor) -> dict[str, list[int]]:
    scales = value.scales.size
    zero = scales - int(np.count_nonzero(original.reshape(*value.scales.shape, -1).any(axis=-1)))
    return {"zero_groups": [zero, scales]} if zero else {}


def _inputs(weight: StoredWeight) -> dict[str, str]:
    """What is said of a layer's input, and a convolution's output, where there is anything to say."""
    rule, row = weight.rule, {}
    if rule is not None and rule.activation is not None:
        row = {"activation_format": rule.activation.format.name, "activation_scales": str(rule.activation.scales)}
        if rounds_output(rule.activation, weight.original.shape):
            row["output_format"] = rule.activation.of_output.format.name
    if rule is not None and rule.smooth is not None and weight.smoothed:
        row["smooth"] = rule.smooth
    return row


def _count(row: Mapping[str, Any]) -> int:
    count = 1
    for size in row["shape"]:
        count *= size
    return count
