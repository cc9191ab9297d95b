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
report = import_module("topkld_report")


def row(scheme: str, loss: str, kl: float, seed: int | None = None, start: str = "gptq", **more: Any) -> dict[str, Any]:
    same = {"model": "m", "scheme": scheme, "start": start, "loss": loss, "kl": kl, "seed": seed}
    return same | {"steps": 200, "data": "teacher", "wall_s": 8.0, "held_out": {}} | more


CURVE = [row("ternary", "none", 1.0), row("W2", "none", 0.5), row("W3", "none", 0.1), row("W4", "none", 0.01)]


def test_pairs_are_of_one_seed() -> None:
    rows = [row("W2", "forward", kl, seed) for seed, kl in enumerate((0.10, 0.20, 0.40))]
    rows += [row("W2", "split", kl, seed, top_k=900) for seed, kl in enumerate((0.09, 0.18, 0.36))]
    rows += [row("W2", "split", 9.0, 7, top_k=900), row("W3", "split", 9.0, 0, top_k=900)]  # without a partner
    rows += [row("W2", "split", 9.0, 0, top_k=900, data="other")]
    (entry,) = tables.paired(rows)
    assert entry["differences"] == pytest.approx([-0.1] * 3)
    assert entry["verdict"] == "better"  # although the seeds differ by far more among each other
    assert "| -10.0% | -10.0% … -10.0% | 0.0% | better |" in "\n".join(report.pairs_of(rows))


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
    rows[-2]["top_k"] = rows[-1]["top_k"] = 900
    (line,) = [line for line in report.levels_of(rows) if line.startswith("| m |")]
    assert line.endswith("|  | – / – / +1.50 | – / – / ≥ +1.00 |  |")
    (untrained,) = tables.levels([*CURVE, row("W3", "split", 0.1, 0)], ["gptq"])
    assert untrained["gptq"][0] == pytest.approx(0.0)


def test_at_least_no_level_is_not_told() -> None:
    (line,) = [line for line in report.levels_of([*CURVE, row("W4", "forward", 0.001, 0)]) if line.startswith("| m |")]
    assert line.endswith("|  |  |  | – / – / – |")


def test_points_that_do_not_fall_are_left_out() -> None:
    rows = [row("ternary", "none", 0.9), row("W2", "none", 1.1), row("W4", "none", 0.1), row("W3", "none", 0.1)]
    assert [bits for bits, _ in tables.curve(rows, "m", "gptq", "")] == [2.0, 4.0]
    assert tables.bits_on(tables.curve(CURVE, "m", "gptq", ""), 2.0) == (math.log2(3), "≤")


def test_groups_and_activations_are_apart() -> None:
    rows = [*CURVE, row("W2 g128", "split", 0.1, 0), row("W2A8", "split", 0.1, 0)]
    (entry,) = tables.levels(rows, ["gptq"])
    assert entry["scheme"] == "W2 g128"
    assert "gptq" not in entry  # there is no curve of groups of 128


def test_agreement_is_better_where_it_is_more() -> None:
    rows = [row("W2", "forward", 0.1, seed, top900_agreement=0.9) for seed in range(3)]
    rows += [row("W2", "js", 0.1, seed, top900_agreement=0.91 + seed / 1000) for seed in range(3)]
    (entry,) = tables.paired(rows, "top900_agreement")
    assert (entry["mean"], entry["verdict"]) == (pytest.approx(0.011), "better")
    (cross,) = tables.paired([one | {"cross_entropy": one["top900_agreement"]} for one in rows], "cross_entropy")
    assert cross["verdict"] == "worse"


def test_fd_of_other_counts_is_left_out() -> None:
    rows = [
        row("W2", "forward", 0.1, 0, fd={"value": 3.0, "n": 1000}),
        row("W2", "js", 0.1, 0, fd={"value": 2.7, "n": 1000}),
    ]
    rows += [row("W2", "reverse", 0.1, 0, fd={"value": 2.0, "n": 500})]
    (entry,) = tables.paired(rows, "fd")
    assert (entry["loss"], entry["differences"]) == ("js", pytest.approx([-0.1]))


def test_settings_are_not_mixed() -> None:
    rows = [
        row("W2", "forward", 0.1, 0),
        row("W2", "split", 0.05, 0, lr=0.02),
        row("W2", "split", 0.05, 0, samples=8192),
    ]
    assert tables.paired(rows) == []


def test_k_sweep_by_hand() -> None:
    rows = [row("W2", "forward", 0.2, seed) for seed in (0, 1)]
    rows += [row("W2", "split", kl, seed, top_k=k) for k, kl in ((1, 0.3), (4096, 0.2)) for seed in (0, 1)]
    rows += [row("W2", "mixed", 0.2, 0, top_k=900)]  # not swept
    (line,) = [line for line in report.sweep_of_k(rows) if line.startswith("| m |")]
    assert line == "| m | W2 | 200 steps | `split` | +50.0 ± 0.0 % **worse** | +0.0 ± 0.0 % |"


def test_goals_take_the_best_whatever_its_settings() -> None:
    tried: list[tuple[float, dict[str, Any]]] = [(0.06, {}), (0.049, {"lr": 0.02})]
    rows = [row("W2", "forward", kl, 0, model="var-c10-d4", **more) for kl, more in tried]
    found = {(goal["model"], goal["scheme"]): goal for goal in tables.goals(rows)}
    goal = found["var-c10-d4", "W2"]
    assert (goal["met"], goal["row"]["kl"]) == (True, 0.049)
    assert not found["var-c10-d4", "W3"]["met"]
    text = "\n".join(report.goals_of(rows))
    assert "| var-c10-d4 | W2 | 0.05 | 0.0490 | met | `forward` | 200 steps, lr 0.02 |" in text
    assert "| var-c10-d4 | W3 | 0.02 |  | not measured |" in text


def test_all_settings_count_once_each() -> None:
    """Two schemes with means of −10 % and −20 %: −15 %, and Student's interval of two numbers."""
    rows = [row(scheme, "forward", 1.0, seed) for scheme in ("W2", "W3") for seed in range(3)]
    rows += [row("W2", "js", 0.9, seed) for seed in range(3)] + [row("W3", "js", 0.8, seed) for seed in range(3)]
    half = float(stats.t.ppf(0.975, 1)) * 0.1 / math.sqrt(2) / math.sqrt(2) * 100
    pooled = (
        float(stats.t.ppf(0.975, 5)) * math.sqrt(6 * 0.05**2 / 5) / math.sqrt(6) * 100
    )  # all six, 5 points from -15
    text = "\n".join(report.verdicts(rows))
    assert f"| `js` | 2 | 2 | 0 | 0 | -15.0 ± {half:.1f} % | -15.0 ± {pooled:.1f} % **better** (6) |" in text


def test_other_samples_have_a_line_other_rates_have_not() -> None:
    rows = [row("W3", "forward", 0.02, 0, samples=8192), row("W3", "forward", 0.03, 0, lr=0.02)]
    _, body = report.side_by_side(rows, tables.figure_of, [("forward", None)], 4)
    assert body == [("m", "W3", "200 steps, samples 8192", "", "", "", "0.0200")]


def test_a_rate_of_the_rest_is_shown_where_it_differs() -> None:
    """Rows of before name no such rate, nor do their settings: 0."""
    usual = {"settings": {"lr": 0.01}}
    rows = [*CURVE, row("W2", "forward", 0.2, 0, **usual)]
    assert "rest_lr" not in report.report(rows) + report.as_csv(rows)
    rows.append(row("W2", "forward", 0.15, 0, rest_lr=0.005, settings={"lr": 0.01, "rest_lr": 0.005}))
    lines = [line for line in report.rates_of(rows) if line.startswith("| m |")]
    assert [line.split(" | ")[5:7] for line in lines] == [["0.005", "0"], ["0", "0"]]
    head, *cells = (line.split(",") for line in report.as_csv(rows).splitlines())
    assert [line[head.index("rest_lr")] for line in cells] == ["", "", "0", "0.005", "", ""]
    assert not tables.paired(rows)  # two settings, not two losses of one


def test_report_of_everything_and_csv() -> None:
    rows = [one | {"wall_s": 0.1} for one in CURVE] + [row("W2", "forward", 0.2, seed) for seed in range(3)]
    rows[0]["fd"] = {"value": 3.0, "n": 1000, "ci95": [2.9, 3.1]}
    text = report.report(rows)
    assert "| m | W2 | 200 steps |  |  | 0.50000 | 0.20000 ± 0.00000 |" in text
    assert "| m | ternary |  |  |  | 3.00 |" in text  # FD of an untrained one
    lines = report.as_csv(rows).splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[1].startswith("m,ternary,gptq,none,")
    assert ",3,2.9,3.1,1000," in lines[1]
