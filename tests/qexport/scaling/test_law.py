"""The law on made-up sweeps whose answers are known, and fits against SciPy."""

from __future__ import annotations

from typing import Any

import made_up
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats

from qexport.errors import InputError
from qexport.scaling.at_equal_bits import compare_lowest, compare_series
from qexport.scaling.axes import COMPUTE
from qexport.scaling.curves import curves_of, height, offset
from qexport.scaling.figures import RESAMPLES
from qexport.scaling.findings import findings, findings_of_axis, laws_of
from qexport.scaling.fits import Fit, fit_power_law, fit_with_intervals
from qexport.scaling.grid import Measurement, Run, describe
from qexport.scaling.law import TOGETHER, series_law
from qexport.scaling.select import Selection


def power(series, parameters, bits, method):
    return 30.0 * parameters**-0.15 * bits**-0.4


def points(noise=0.0):
    rng = np.random.default_rng(1)
    parameters, bits = (a.ravel() for a in np.meshgrid([1e6, 2e6, 4e6, 9e6], [2.0, 3.5, 4.5, 8, 16]))
    return parameters, bits, 30 * parameters**-0.15 * bits**-0.4 * np.exp(noise * rng.standard_normal(len(bits)))


def test_a_power_law_is_found_again():
    fit = fit_power_law(*points())
    assert (fit.a, fit.alpha, fit.beta) == pytest.approx((np.log(30), 0.15, 0.4))
    assert fit.rms < 1e-12
    assert fit.r2 == pytest.approx(1)


def test_fits_agree_with_scipy():
    parameters, bits, y = points(noise=0.1)
    fit = fit_power_law(parameters, bits, y)

    def residual(c):
        return np.log(y) - (c[0] - c[1] * np.log(parameters) - c[2] * np.log(bits))

    other = scipy.optimize.least_squares(residual, [0.0, 0.0, 0.0], xtol=1e-12, gtol=1e-12)
    assert (fit.a, fit.alpha, fit.beta) == pytest.approx(tuple(other.x), rel=1e-6)
    assert fit.rms == pytest.approx(np.sqrt(np.mean(residual(other.x) ** 2)))
    assert fit.worst == pytest.approx(np.abs(residual(other.x)).max())
    assert 0.05 < fit.rms < 0.2  # mutation: a fit that reports no residual would not be here

    # Along one width, the slope over sizes of what the fit leaves is that of the line SciPy draws.
    fitted = fit.a - fit.alpha * np.log(parameters) - fit.beta * np.log(bits)
    chosen = bits == 3.5
    line: Any = scipy.stats.linregress(np.log(parameters[chosen]), fitted[chosen])
    assert -line.slope == pytest.approx(fit.alpha)


@pytest.mark.parametrize(
    ("parameters", "bits", "y", "says"),
    [
        ([1e6, 2e6, 1e6], [2, 2, 4], [1, 2, 3], "more than 3"),
        ([1e6, 2e6, 1e6, 2e6], [2, 2, 2, 2], [1, 2, 3, 4], "several sizes at several widths"),
        ([1e6, 2e6, 1e6, 2e6], [2, 2, 4, 4], [1, 2, 3, 0], "positive"),
    ],
)
def test_points_that_make_no_fit(parameters, bits, y, says):
    with pytest.raises(InputError, match=says):
        fit_power_law(np.array(parameters, float), np.array(bits, float), np.array(y, float))


def test_curves_are_straight_between_sizes_and_end_where_they_end():
    x, y = np.array([20.0, 22.0]), np.array([3.0, 1.0])
    np.testing.assert_array_equal(height(x, y, np.array([19.9, 20, 21, 22, 22.1])), [np.nan, 3, 2, 1, np.nan])


def test_an_offset_by_hand():
    reference = np.array([20.0, 22.0, 24.0]), np.array([4.0, 2.0, 1.0])
    assert offset(reference[0] - 1.5, reference[1], *reference) == pytest.approx(1.5)
    assert offset(*reference, reference[0] - 1.5, reference[1]) == pytest.approx(-1.5)
    # Half way up, straight against bent: x(y) = 24 − y and its inverse on 1 … 3, minus the bent line's 22 + 2(2 − y)
    # below 2 and 22 − (y − 2) above: the gap is −(2 − y) below and 0 above; its mean over 1 … 3 is −1/4.
    x, y = np.array([21.0, 23.0]), np.array([3.0, 1.0])
    bent = np.array([21.0, 22.0, 24.0]), np.array([3.0, 2.0, 1.0])
    assert offset(x, y, *bent) == pytest.approx(0.25)


def test_offsets_that_are_not_defined():
    reference = np.array([20.0, 22.0]), np.array([4.0, 2.0])
    assert np.isnan(offset(np.array([10.0, 12.0]), np.array([9.0, 5.0]), *reference))  # no common quality
    assert np.isnan(offset(np.array([10.0, 12.0, 14.0]), np.array([4.0, 2.0, 3.0]), *reference))  # does not fall
    assert np.isnan(offset(np.array([10.0]), np.array([3.0]), *reference))


def test_the_law_of_a_sweep_whose_law_is_known():
    law = series_law(made_up.selection(power), "var-c10")
    assert law.quality == "cross_entropy"
    fit = law.fits["cross_entropy"][TOGETHER]
    assert isinstance(fit, Fit)
    assert (fit.law.alpha, fit.law.beta) == pytest.approx((0.15, 0.4))
    # Quality falls faster with bits (0.4) than with parameters (0.15): at equal total bits, wide weights win.
    for item in law.best:
        if item.second is not None and item.best.number_format != "fp16":
            assert item.log2_bits < np.log2(16e6)
    # (16/4)^0.4 = 1.74 is more than the sizes make up for, 4^0.15 = 1.23: no quality is common, nothing is said.
    saved = {item.cell.number_format: item.saved for item in law.offsets}
    assert saved["int4"].value is None


def offset_law(series, parameters, bits, method):
    """Quality depends on parameters alone: every bit less is saved outright."""
    return 10 - np.log2(parameters) / 4


def test_bits_that_cost_nothing_are_saved():
    law = series_law(made_up.selection(offset_law), "var-c10")
    saved = {item.cell.number_format: item.saved for item in law.offsets}
    for bits in (2, 3, 4):
        found = saved[f"int{bits}"]
        assert found.value == pytest.approx(np.log2(16 / bits))
        assert found.sign == 1
    assert law.best[0].best.number_format == "int2"


def stepped(gain):
    """2 bits cost 3, 3 bits 2, 4 bits 1 of the unit; method "gptq" takes `gain` of them away at 2 bits."""

    def value(series, parameters, bits, method):
        cost = {2: 3.0, 3: 2.0, 4: 1.0, 16: 0.0}[bits]
        return 10 - np.log2(parameters) / 4 + 0.1 * (cost - (gain if method == "gptq" and bits == 2 else 0))

    return value


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0, 1.7])
def test_levels_gained_are_counted_in_steps(gain):
    law = series_law(made_up.selection(stepped(gain), methods=("rtn", "gptq")), "var-c10")
    (item,) = [i for i in law.levels if i.figure == "cross_entropy" and i.number_format == "int2" and i.base == "rtn"]
    assert item.gained.value == pytest.approx(gain)
    assert item.sizes == 3
    assert item.gained.low is not None
    assert item.gained.high is not None
    # All runs see the same images: the interval is that of the difference, which has no spread here.
    assert item.gained.high - item.gained.low < 1e-6


def test_levels_of_a_step_that_does_not_help_are_not_shown():
    law = series_law(made_up.selection(offset_law, methods=("rtn", "gptq")), "var-c10")
    assert all(item.gained.value is None for item in law.levels if item.figure == "cross_entropy")


@pytest.mark.parametrize(("share", "sign"), [(0.1, 1), (0.02, -1), (0.05, 0)])
def test_series_are_set_side_by_side_by_what_they_lose(share, sign):
    def value(series, parameters, bits, method):
        own = (10 - np.log2(parameters) / 4) * (1 if series == "var-c10" else 30)
        return own * (1 if bits == 16 else 1 + (share if series == "dit-c10" else 0.05))

    laws = laws_of(made_up.selection(value, series=("dit-c10", "var-c10"), noise=1e-4))
    for item in laws["dit-c10"].degraded:
        assert item.share.value == pytest.approx(share, rel=1e-6)
        assert item.sizes == 3
    texts = [item.text for item in findings(laws) if "DDPM loss and cross-entropy" in item.topic]
    said = {1: "var-c10 loses less", -1: "dit-c10 loses less", 0: "not shown which loses less"}[sign]
    assert len(texts) == 3
    if sign:
        assert all(said in text for text in texts)


def two_series(gap):
    def value(series, parameters, bits, method):
        return 10 - np.log2(parameters * bits) / 8 + (gap if series == "var-c10" else 0)

    return value


@pytest.mark.parametrize(("gap", "sign"), [(-0.1, -1), (0.1, 1), (0.0, 0)])
def test_series_at_equal_bits(gap, sign):
    chosen = made_up.selection(two_series(gap), series=("dit-c10", "var-c10"))
    laws = laws_of(chosen)
    compared = compare_series(laws["var-c10"].curves["fd"], laws["dit-c10"].curves["fd"])
    assert len(compared) == 4
    for item in compared:
        assert item.difference.value == pytest.approx(10 * gap, abs=1e-9)
        assert item.difference.sign == sign
    texts = [item.text for item in findings(laws) if "at equal total bits" in item.topic]
    better = {-1: "var-c10 is better", 1: "dit-c10 is better", 0: "not shown which is better"}[sign]
    assert len(texts) == 5  # four formats, and the lowest of each
    assert all(better in text for text in texts)


def test_best_width_is_shown_only_where_the_interval_decides():
    def value(series, parameters, bits, method):
        return 10 - np.log2(parameters) / 4

    # With the noise of images common to all runs, differences are certain; FD's are not common.
    chosen = made_up.selection(value, noise=1.0)
    for row in chosen.rows.values():
        del row.measured.figures["cross_entropy"]  # type: ignore[attr-defined]
    law = series_law(chosen, "var-c10")
    assert law.quality == "fd"
    assert all(item.gap.sign <= 0 for item in law.best if item.second)


def test_curves_share_their_resamples():
    curves = curves_of(made_up.selection(offset_law), "var-c10", "cross_entropy")
    two, four = (next(c for cell, c in curves.items() if cell.number_format == f"int{b}") for b in (2, 4))
    assert np.std(two.samples[:, 0]) > 1e-4
    np.testing.assert_allclose(two.samples - two.y, four.samples - four.y, atol=1e-9)


def test_against_compute_bits_a_network_that_runs_twice_costs_twice():
    """Total bits are alike, DiT's compute bits twice VAR's: what was level is one bit apart, FD 10/8 of it."""
    chosen = made_up.selection(two_series(0.0), series=("dit-c10", "var-c10"))
    for run, row in chosen.rows.items():
        row.measured.cost["compute_bits"] *= 2 if run.series == "dit-c10" else 1  # type: ignore[index]
    laws, by_compute = laws_of(chosen), laws_of(chosen, COMPUTE)
    level, apart = (
        {
            i.a.number_format: i.difference
            for i in compare_series(of["dit-c10"].curves["fd"], of["var-c10"].curves["fd"])
        }
        for of in (laws, by_compute)
    )
    for name, found in apart.items():
        assert level[name].value == pytest.approx(0, abs=1e-9)
        assert found.value == pytest.approx(10 / 8)
        assert found.sign == 1
    texts = [item.text for item in findings_of_axis(by_compute) if "at equal compute bits (FD)" in item.topic]
    assert len(texts) == 5
    assert all("var-c10 is better" in text for text in texts)
    # Levels and losses compare runs of one size and know no axis.
    for law in laws.values():
        other = by_compute[law.series]
        assert [item.gained for item in law.levels] == [item.gained for item in other.levels]
        assert [item.share for item in law.degraded] == [item.share for item in other.degraded]
        assert {item.cell: item.saved for item in law.offsets} == {item.cell: item.saved for item in other.offsets}


def test_lowest_curves_meet_where_no_width_does():
    """DiT costs ten times the compute: no width of both reaches a common size, VAR's 16 bits and DiT's 2 do."""

    def value(series, parameters, bits, method):
        return (10 - np.log2(parameters) / 4) if series == "var-c10" else 20.0

    chosen = made_up.selection(value, series=("dit-c10", "var-c10"))
    for run, row in chosen.rows.items():
        row.measured.cost["compute_bits"] *= 10 if run.series == "dit-c10" else 1  # type: ignore[index]
    laws = laws_of(chosen, COMPUTE)
    a, b = (laws[name].curves["fd"] for name in ("dit-c10", "var-c10"))
    assert all(item.log2_bits is None for item in compare_series(a, b))
    found = compare_lowest(list(a.values()), list(b.values()))
    assert found is not None
    assert found.log2_bits == pytest.approx((np.log2(1e8 * 2 * 10), np.log2(4e8 * 16)))
    assert [cell.number_format for cell in found.cells[1]] == ["fp16"]
    # FD of VAR at 16 bits, a straight line in log₂ bits, at both ends by hand.
    ends = [10 * (10 - (x - np.log2(1600)) / 4) for x in found.log2_bits]
    assert found.difference.value == pytest.approx(200 - np.mean(ends))
    assert found.difference.sign == 1


def test_a_fits_intervals_agree_with_scipys_bootstrap():
    parameters, bits, y = points(noise=0.2)
    own = fit_with_intervals(parameters, bits, y, [np.full(RESAMPLES, value) for value in y])

    def slopes(n, b, values):
        found: Any = scipy.linalg.lstsq(np.stack([np.ones(len(n)), -np.log(n), -np.log(b)], axis=1), np.log(values))
        return found[0]

    other: Any = scipy.stats.bootstrap(
        (parameters, bits, y), slopes, paired=True, vectorized=False, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    for found, low, high in zip((own.a, own.alpha, own.beta), other.low, other.high, strict=True):
        assert found.low is not None
        assert found.high is not None
        assert found.value is not None
        # Each end of either is good to about 7 % of the half-width; mutation: without drawing runs both are the value.
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))
        assert found.low < found.value < found.high


def test_a_fits_interval_has_the_images_in_it():
    """Points that lie on the law: drawing runs changes nothing, and what all images share moves `a` alone."""
    parameters, bits, y = points()
    factor = np.exp(0.05 * np.random.default_rng(2).standard_normal(RESAMPLES))
    found = fit_with_intervals(parameters, bits, y, [value * factor for value in y])
    assert found.a.low is not None
    assert found.a.high is not None
    assert found.a.high - found.a.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    assert (found.beta.low, found.beta.high) == pytest.approx((0.4, 0.4))
    assert found.r2.value == pytest.approx(1)


def test_a_fit_of_few_runs_says_where_resamples_leave_none():
    """Two sizes at two widths and one more: many draws hold one size or one width only."""
    parameters, bits = np.array([1e6, 1e6, 2e6, 2e6]), np.array([2.0, 4, 2, 4])
    found = fit_with_intervals(
        parameters, bits, np.array([4.0, 2, 3, 1.5]), [np.full(RESAMPLES, v) for v in (4, 2, 3, 1.5)]
    )
    assert np.isnan(found.samples).any()
    assert (found.beta.low, found.beta.high) == (None, None)


def test_levels_of_every_size_and_which_way_they_go():
    """2 bits gain 0.2, 0.5 and 0.5 of a level from the smallest size to the largest."""
    gains = {1e6: 0.2, 2e6: 0.5, 4e6: 0.5}

    def value(series, parameters, bits, method):
        return stepped(gains[parameters])(series, parameters, bits, method)

    laws = laws_of(made_up.selection(value, methods=("rtn", "gptq")))
    (item,) = [i for i in laws["var-c10"].levels if i.figure == "kl" and i.number_format == "int2" and i.base == "rtn"]
    assert [size.model for size in item.by_size] == ["var-c10-d2", "var-c10-d3", "var-c10-d4"]
    assert [size.gained.value for size in item.by_size] == pytest.approx([0.2, 0.5, 0.5])
    assert item.by_size[1].beyond.value == pytest.approx(0.3)
    assert item.by_size[1].beyond.sign == 1
    texts = [i.text for i in findings(laws) if i.topic.startswith("Size by size") and "gptq at int2" in i.text]
    assert len(texts) == 1
    assert " d2 0.2 (0.2 … 0.2) < d3 0.5 (0.5 … 0.5)" in texts[0]


def test_kinds_of_equal_width_are_set_side_by_side():
    rows = {}
    for size, parameters in made_up.SIZES.items():
        for name, error in (("int4", 1.0), ("fp4-e2m1", 1.5 if size == "d2" else 2.0), ("int3", 3.0)):
            run = Run(f"var-c10-{size}", name, "rtn")
            rows[run] = made_up.row(run, error, parameters=parameters, bits=4.0, noise=0.1)
    chosen = Selection(rows, describe(Measurement(images_sha256="0")), 0)
    (item,) = series_law(chosen, "var-c10").kinds
    assert (item.floating, item.integer, item.method) == ("fp4-e2m1", "int4", "rtn")
    assert item.ratio.value == pytest.approx(5.5 / 3)
    assert [found.value for found in item.by_size.values()] == pytest.approx([1.5, 2, 2])
    assert item.ratio.low is not None
    assert 1.7 < item.ratio.low < 5.5 / 3
