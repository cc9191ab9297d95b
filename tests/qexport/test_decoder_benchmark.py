"""The figures of benchmarks/decoders.py and layer_kinds.py, worked by hand; forms of benchmarks/format_support.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import decoders
import format_support
import layer_kinds

from qexport.formats import get_format
from qexport.pipeline import load_generator


def test_psnr_is_of_the_mean_over_all_images():
    wanted = np.zeros((2, 3, 4, 4), np.float32)
    found = wanted.copy()
    found[0] += 0.1  # squared 0.01
    found[1] += 0.2  # and 0.04
    result = decoders.psnr_db(found, wanted)
    assert result["psnr_db"] == pytest.approx(-10 * np.log10(0.025), abs=1e-5)
    assert result["interval"] == pytest.approx([-10 * np.log10(0.04), 20], abs=1e-5)
    both = decoders.psnr_db(wanted + 0.1, wanted)
    assert both["interval"] == pytest.approx([20, 20], abs=1e-5)
    assert decoders.psnr_db(wanted, wanted)["psnr_db"] is None


def test_bytes_of_a_decoder_fall_with_its_form():
    generator = load_generator("dit-c10-d2")
    sizes = [decoders.size_bytes(generator, form) for form in (decoders.FP32, decoders.FP16, decoders.W8)]
    parameters = generator.graph("decode").parameters()
    assert sizes[0] == sum(4 * p.numel() for p in parameters.values())
    vectors = sum(p.numel() for p in parameters.values() if p.ndim < 2)
    assert sizes[1] == sizes[0] // 2 + 2 * vectors  # vectors stay float32
    assert sizes[0] / 4 < sizes[2] < sizes[0] / 3.8


def test_a_kind_costs_the_sum_of_its_layers_and_the_worst_is_counted_by_sample():
    small, great = np.array([1.0, 3.0, 2.0]), np.array([10.0, 30.0, 20.0])
    sums = {(kind, title): cost for title in layer_kinds.COLUMNS for kind, cost in (("a", small), ("b", great))}
    first, second = layer_kinds.rows(sums, {"a": 2, "b": 1}, {"a": 8, "b": 4})
    figure = first[layer_kinds.WEIGHT]
    assert figure["cost"] == 2
    assert 1 <= figure["interval"][0] < 2 < figure["interval"][1] <= 3
    assert (figure["share_worst"], second[layer_kinds.WEIGHT]["share_worst"]) == (0, 1)


@pytest.mark.parametrize(("scales_of", "steps"), [("static", [0.5, 0.5]), ("per token", [1 / 127, 2 / 127])])
def test_inputs_are_rounded_as_the_form_says(scales_of, steps):
    x = np.array([[1.0, 0.3], [-2.0, 0.3]], np.float32)
    found = format_support.quantised_input(x, get_format("int8"), scales_of, 0.5)
    want = [[np.rint(value / step) * step for value in row] for row, step in zip(x, steps, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-6)
