"""The tables of benchmarks/topkld_quality.py: pairs and levels, worked by hand and with SciPy."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

tables = import_module("topkld_tables")


def row(scheme: str, loss: str, kl: float, seed: int | None = None, start: str = "gptq", **more: Any) -> dict[str, Any]:
    return {"model": "m", "scheme": scheme, "start": start, "loss": loss, "kl": kl, "seed": seed, **more}


CURVE = [row("ternary", "none", 1.0), row("W2", "none", 0.5), row("W3", "none", 0.1), row("W4", "none", 0.01)]


def test_pairs_are_of_one_seed() -> None:
    rows = [row("W2", "forward", kl, seed) for seed, kl in enumerate((0.10, 0.20, 0.40))]
    rows += [row("W2", "split", kl, seed, top_k=900) for seed, kl in enumerate((0.09, 0.18, 0.36))]
    rows += [row("W2", "split", 9.0, 7, top_k=900), row("W3", "split", 9.0, 0, top_k=900)]  # without a partner
    rows += [row("W2", "split", 9.0, 0, top_k=900, data="other")]
    (entry,) = tables.paired(rows)
    assert entry["differences"] == pytest.approx([-0.1] * 3)
    assert entry["verdict"] == "better"  # although the seeds differ by far more among each other
    assert "| -10.0% | -10.0% … -10.0% | 0.0% | better |" in "\n".join(tables.pairs_table(rows))


@pytest.mark.parametrize("values", [(-0.01, -0.02, -0.03), (-0.01, 0.02, -0.03), (0.011, 0.010, 0.012), (0.3, 0.1)])
def test_verdict_is_that_of_students_test(values: tuple[float, ...]) -> None:
    found = tables.verdict(values)
    test: Any = stats.ttest_1samp(values, 0)
    shown = test.pvalue < 0.05
    assert found["verdict"] == (("better" if sum(values) < 0 else "worse") if shown else "not shown")
    interval = test.confidence_interval(0.95)
    assert (found["mean"] - found["half"], found["mean"] + found["half"]) == pytest.approx(tuple(interval))


def test_one_seed_shows_nothing() -> None:
    assert tables.verdict([-0.5])["verdict"] == "not shown"


def test_levels_by_hand() -> None:
    """W2 trained to √(0.1 · 0.01), half way between W3 and W4 in the logarithm: 3.5 bits, 1.5 levels."""
    rows = [*CURVE, row("W2", "split", math.sqrt(0.1 * 0.01), 0), row("W3", "split", 0.001, 0)]
    first, second = tables.levels(rows, ["gptq"])
    assert first["gptq"][0] == pytest.approx(1.5)
    assert second["gptq"] == (1.0, 1.0, 1.0, "≥")  # past W4, the last point
    assert "≥ +1.00" in "\n".join(tables.levels_table(rows))
    (untrained,) = tables.levels([*CURVE, row("W3", "split", 0.1, 0)], ["gptq"])
    assert untrained["gptq"][0] == pytest.approx(0.0)


def test_points_that_do_not_fall_are_left_out() -> None:
    rows = [row("ternary", "none", 0.9), row("W2", "none", 1.1), row("W4", "none", 0.1), row("W3", "none", 0.1)]
    assert [bits for bits, _ in tables.curve(rows, "m", "gptq", "")] == [2.0, 4.0]
    assert tables.bits_on(tables.curve(CURVE, "m", "gptq", ""), 2.0) == (math.log2(3), "≤")


def test_groups_and_activations_are_apart() -> None:
    rows = [*CURVE, row("W2 g128", "split", 0.1, 0), row("W2A8", "split", 0.1, 0)]
    (entry,) = tables.levels(rows, ["gptq"])
    assert entry["scheme"] == "W2 g128"
    assert "gptq" not in entry  # there is no curve of groups of 128
