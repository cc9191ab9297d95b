import subprocess
import sys

import numpy as np
import pytest
from dit_support import spec
from dit_support import tensors as fixture_tensors
from qexport_models.dit.schedule import ROW_COLUMNS, ddim_rows, ddpm_rows, kept_timesteps, linear_betas, make_schedule

from qexport.errors import InputError

FLOAT64_RTOL = 1e-12
"""Tables are float64 and were measured bit-equal; another NumPy may sum or take roots with other last bits."""

FLOAT32_RTOL = 2.0**-23
RESPACINGS = ("10", "25", "50", "100", "250", "ddim10", "ddim25", "ddim50", "ddim100", "ddim250")


def column(rows: np.ndarray, name: str) -> np.ndarray:
    return rows[::-1, ROW_COLUMNS.index(name)].astype(np.float64)


@pytest.fixture(scope="module")
def published():
    return {key: value.numpy() for key, value in fixture_tensors("dit-schedules").items()}


def test_fixture_has_these_respacings():
    assert {key.split(".")[0] for key in spec("dit-schedules")["tensors"]} == set(RESPACINGS)


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_tables_are_the_published_ones(published, respacing):
    schedule = make_schedule(respacing)
    wanted = {key.split(".")[1]: value for key, value in published.items() if key.startswith(f"{respacing}.")}
    assert len(wanted) == 9
    for name, value in wanted.items():
        got = getattr(schedule, name)
        assert got.dtype == value.dtype
        np.testing.assert_allclose(got, value, rtol=FLOAT64_RTOL if value.dtype == np.float64 else 0, err_msg=name)


def test_mutation_betas_that_are_not_derived_again(published):
    kept = linear_betas()[kept_timesteps("50")]
    assert not np.allclose(kept[1:], published["50.betas"][1:], rtol=0.1)


def test_mutation_multiplied_stride_rounds_otherwise_somewhere():
    """Why the stride is accumulated: the two differ for some counts, and the published schedules accumulate."""

    def multiplied(n: int) -> list[int]:
        return [round(i * (999 / (n - 1))) for i in range(n)]

    assert any(multiplied(n) != kept_timesteps(n) for n in range(2, 1001))


@pytest.mark.parametrize(("tag", "respacing"), [("ddpm", "8"), ("ddim", "ddim10")])
def test_loops_of_the_tiny_fixture_use_these(tag, respacing):
    fixture = fixture_tensors("dit-tiny-shared")
    schedule = make_schedule(respacing)
    assert np.array_equal(schedule.timestep_map, fixture[f"{tag}.timestep_map"].numpy())
    np.testing.assert_allclose(schedule.betas, fixture[f"{tag}.betas"].numpy(), rtol=FLOAT64_RTOL)


@pytest.mark.parametrize(
    ("respacing", "steps", "kept"),
    [
        ("3", 6, [0, 2, 5]),  # 2.5 rounds to the even 2
        ("3", 4, [0, 2, 3]),  # 1.5 rounds to the even 2
        ("2,3", 10, [0, 4, 5, 7, 9]),
        ("1,1", 5, [0, 3]),  # sections of 3 and 2
        ("ddim5", 10, [0, 2, 4, 6, 8]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_kept_timesteps_by_hand(respacing, steps, kept):
    assert kept_timesteps(respacing, steps) == kept


@pytest.mark.parametrize(
    "respacing", ["", "0", "-1", "fast", "ddim", "ddim300", "ddim10,10", "1001", "10,", "2.5", "600,600"]
)
def test_respacings_that_are_refused(respacing):
    with pytest.raises(InputError, match="respacing"):
        make_schedule(respacing)


@pytest.mark.parametrize("respacing", ["8", "ddim10", "1000", "1"])
def test_rows_run_from_noise_to_picture_and_end_without_noise(respacing):
    schedule = make_schedule(respacing)
    for rows in (ddpm_rows(schedule), ddim_rows(schedule)):
        assert rows.shape == (schedule.steps, len(ROW_COLUMNS))
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        assert np.isfinite(rows).all()
        assert np.array_equal(rows[:, 0].astype(np.int64), schedule.timestep_map[::-1])
        assert column(rows, "learned")[0] == column(rows, "sigma_unit")[0] == column(rows, "eps_variance")[0] == 0


def test_ddpm_rows_hold_the_published_tables(published):
    rows = ddpm_rows(make_schedule("50"))
    for name, table in {
        "recip": "sqrt_recip_alphas_cumprod",
        "recipm1": "sqrt_recipm1_alphas_cumprod",
        "x0_coef": "posterior_mean_coef1",
        "x_coef": "posterior_mean_coef2",
    }.items():
        np.testing.assert_allclose(column(rows, name), published[f"50.{table}"], rtol=FLOAT32_RTOL)
    small, large = published["50.posterior_log_variance_clipped"], np.log(published["50.betas"])
    np.testing.assert_allclose(column(rows, "min_log_variance")[1:], small[1:], rtol=FLOAT32_RTOL)
    np.testing.assert_allclose(column(rows, "max_log_variance")[1:], large[1:], rtol=FLOAT32_RTOL)
    fixed = ddpm_rows(make_schedule("50"), learned_variance=False)
    assert np.array_equal(column(fixed, "max_log_variance"), column(rows, "min_log_variance"))


def test_ddim_at_eta_one_is_the_posterior_of_ddpm():
    """arXiv:2010.02502, section 4.1: then mean and variance are those of q(x_{t−1} | x_t, x_0)."""
    schedule = make_schedule("50")
    rows = ddim_rows(schedule)
    variance = column(rows, "sigma_unit") ** 2
    np.testing.assert_allclose(variance, schedule.posterior_variance, rtol=1e-6)
    # ε = (x − √ᾱ x̂₀)/√(1 − ᾱ), so the coefficient of ε is shared out between x and x̂₀.
    eps = np.sqrt(np.maximum(column(rows, "eps_variance") - variance, 0)) / np.sqrt(1 - schedule.alphas_cumprod)
    np.testing.assert_allclose(eps, schedule.posterior_mean_coef2, rtol=1e-5)
    x0 = column(rows, "x0_coef") - eps * np.sqrt(schedule.alphas_cumprod)
    np.testing.assert_allclose(x0, schedule.posterior_mean_coef1, rtol=1e-3, atol=1e-6)


def test_schedule_does_not_import_torch():
    code = "import sys, qexport_models.dit.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
