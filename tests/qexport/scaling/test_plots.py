"""Plots of curves: what their bars say, and which curves stand apart."""

from __future__ import annotations

import numpy as np
import pytest

from qexport.scaling.bars import level_bars, own_bars
from qexport.scaling.curves import TOTAL, Cell, Curve
from qexport.scaling.plots import curve_plot

RESAMPLES = 4000
Z_95 = 1.96
NEAR = 0.08
"""The ends of an interval from so many resamples are good to about 4 % of its half-width; two of that."""


def curves(levels, own, shared, seed=0):
    """One curve of two sizes for each level; resamples spread by `own` each and by `shared` together."""
    rng = np.random.default_rng(seed)
    together = shared * rng.standard_normal((RESAMPLES, 1))
    found = []
    for number, level in enumerate(levels):
        y = np.array([level, level - 0.5])
        samples = y + together + own * rng.standard_normal((RESAMPLES, 2))
        x = np.array([20.0, 21.0]) + number / 10
        found.append(Curve(Cell("var-c10", "int4", f"m{number}"), ("var-c10-d2", "var-c10-d3"), x, y, samples))
    return found


@pytest.mark.parametrize("count", [1, 2, 20])
def test_points_that_share_nothing_keep_their_intervals(count):
    """Mutation: without the factor √(n/(n − 1)) two points would have 0.71 of it."""
    for bars in (own_bars, level_bars):
        reach = np.mean(list(bars(curves([6.0] * count, own=0.1, shared=0)).values()))
        assert reach == pytest.approx(Z_95 * 0.1, rel=NEAR), bars


def test_what_all_share_is_no_part_of_the_bars():
    chosen = curves(np.linspace(5, 6, 10), own=0.1, shared=1.0)
    assert np.mean(list(own_bars(chosen).values())) == pytest.approx(Z_95 * 0.1, rel=NEAR)
    assert np.mean(list(level_bars(chosen).values())) == pytest.approx(Z_95 * np.hypot(0.1, 1), rel=NEAR)


def test_a_point_alone_keeps_its_interval():
    (curve,) = curves([6.0], own=0.1, shared=1.0)
    alone = Curve(curve.cell, curve.models[:1], curve.x[:1], curve.y[:1], curve.samples[:, :1])
    assert own_bars([alone])[alone] == pytest.approx(level_bars([alone])[alone])


@pytest.mark.parametrize(
    ("levels", "panels"),
    [
        ([5, 5.2, 5.4, 5.6], 1),
        ([5, 5.2, 5.4, 7.5], 2),
        ([5, 5.2, 7.4, 7.5], 1),  # half of them are not few
        ([5, 6.0, 7.0, 7.6], 1),  # above the others, but within a quarter of their range
        ([5, 5.2, 5.4, 75], 1),  # the axis is logarithmic
    ],
)
def test_few_curves_far_above_stand_over_a_broken_axis(levels, panels):
    drawn = curve_plot(curves(levels, own=0.01, shared=0), "var-c10", "cross_entropy", TOTAL)
    assert len(drawn.axes) == panels
    names = [[str(bars.get_label()) for bars in axes.containers] for axes in drawn.axes]
    assert sorted(name for some in names for name in some) == [f"int4 m{n}" for n in range(len(levels))]
    if panels == 2:
        assert names[0] == ["int4 m3"]
    legend = drawn.axes[-1].get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {name for some in names for name in some}
