"""Diffusion schedules as tables: NumPy only, float64 until the last rounding.

1000 linear betas from 1e-4 to 0.02 (DDPM, arXiv:2006.11239, section 4), thinned to fewer steps by re-deriving the betas
from the kept ᾱ (arXiv:2102.09672, section 4), and one row of numbers per step that turns the same arithmetic into
either sampler:

    x̂₀  = recip·x − recipm1·ε
    x'   = x0_coef·x̂₀ + x_coef·x + √max(eps_variance − σ², 0)·ε + (learned·exp(½ lv) + σ)·noise
    σ    = eta·sigma_unit
    lv   = f·max_log_variance + (1 − f)·min_log_variance,    f = (v + 1)/2

DDPM (arXiv:2006.11239, equations 6 and 7, with the learned variance of arXiv:2102.09672, equation 15) sets eps_variance
and sigma_unit to zero; DDIM (arXiv:2010.02502, equations 12 and 16) sets x_coef and learned to zero. The last step has
no noise: there DDPM's `learned` is zero (and its log variances too, so that no v can make exp overflow), and DDIM's
sigma_unit is zero because ᾱ before the first step is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qexport.errors import InputError

TRAINING_STEPS = 1000
BETA_START = 1e-4
BETA_END = 0.02

DDIM_PREFIX = "ddim"

ROW_COLUMNS = (
    "timestep",
    "recip",
    "recipm1",
    "x0_coef",
    "x_coef",
    "max_log_variance",
    "min_log_variance",
    "learned",
    "eps_variance",
    "sigma_unit",
)
"""Columns of a row, in order; the module's docstring says what each does."""

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of a respaced diffusion; index 0 is the least noisy step. All (steps,), float64 but for `timestep_map`.

    `timestep_map` (int64) holds the original timestep, which the model was trained on and receives. `log_betas` and
    `posterior_log_variance_clipped` bound the learned log variance; the latter has its first entry, −∞, replaced by the
    second.
    """

    timestep_map: NDArray[np.int64]
    betas: F64
    alphas_cumprod: F64
    alphas_cumprod_prev: F64
    sqrt_recip_alphas_cumprod: F64
    sqrt_recipm1_alphas_cumprod: F64
    log_betas: F64
    posterior_variance: F64
    posterior_log_variance_clipped: F64
    posterior_mean_coef1: F64
    posterior_mean_coef2: F64

    @property
    def steps(self) -> int:
        """Model evaluations per image (pairs, with guidance)."""
        return len(self.betas)


def linear_betas(steps: int = TRAINING_STEPS) -> F64:
    """Noise variances of the forward process, (steps,) float64, rising linearly."""
    scale = TRAINING_STEPS / steps
    return np.linspace(scale * BETA_START, scale * BETA_END, steps, dtype=np.float64)


def kept_timesteps(respacing: str | int, training_steps: int = TRAINING_STEPS) -> list[int]:
    """Which original timesteps a respacing keeps, ascending.

    - ``"250"``: 250 steps spread evenly from the first to the last, both kept.
    - ``"10,10,20"``: the same in as many equal sections, 10 of the first, 10 of the second …
    - ``"ddim25"``: every 40th, from 0; the count must come out exactly for a whole stride.

    Raises:
        InputError: not of these forms, or more steps than there are.
    """
    text = str(respacing).strip()
    digits = text.removeprefix(DDIM_PREFIX)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in digits.split(",")):
        raise InputError(f"respacing {text!r}: expected a number of steps like '250', 'ddim50' or '10,10,20'")
    counts = [int(part) for part in digits.split(",")]
    if text.startswith(DDIM_PREFIX):
        return _strided(text, counts, training_steps)
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = training_steps // len(counts) + (i < training_steps % len(counts))
        if count > size:
            raise InputError(f"respacing {text!r}: {count} steps asked of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))  # half to even
            position += stride  # accumulated, not multiplied: the published schedules round this sum
        start += size
    return kept


def _strided(text: str, counts: list[int], training_steps: int) -> list[int]:
    if len(counts) == 1:
        for stride in range(1, training_steps + 1):
            kept = list(range(0, training_steps, stride))
            if len(kept) == counts[0]:
                return kept
    raise InputError(f"respacing {text!r}: no whole stride through {training_steps} steps gives that many")


def make_schedule(respacing: str | int = TRAINING_STEPS, training_steps: int = TRAINING_STEPS) -> Schedule:
    """Tables of the linear schedule over the timesteps that `respacing` keeps.

    Raises:
        InputError: `respacing` is not understood; see `kept_timesteps`.
    """
    timestep_map = np.array(kept_timesteps(respacing, training_steps), dtype=np.int64)
    kept_alphas_cumprod = np.cumprod(1.0 - linear_betas(training_steps))[timestep_map]
    betas = 1.0 - kept_alphas_cumprod / np.append(1.0, kept_alphas_cumprod[:-1])
    alphas = 1.0 - betas
    alphas_cumprod = np.cumprod(alphas, dtype=np.float64)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    # A single step has no second entry; its variance is never used, for the last step draws nothing.
    first = posterior_variance[1] if len(betas) > 1 else betas[0]
    return Schedule(
        timestep_map=timestep_map,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=previous,
        sqrt_recip_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / alphas_cumprod - 1.0),
        log_betas=np.log(betas),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(np.append(first, posterior_variance[1:])),
        posterior_mean_coef1=betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - previous) * np.sqrt(alphas) / (1.0 - alphas_cumprod),
    )


def ddpm_rows(schedule: Schedule, *, learned_variance: bool = True) -> NDArray[np.float32]:
    """Rows of ancestral sampling, (steps, len(ROW_COLUMNS)) float32, in the order of sampling: noisiest first.

    Without `learned_variance` the model's variance output is ignored and the posterior variance β̃ is used.
    """
    zero = np.zeros(schedule.steps)
    noisy = (np.arange(schedule.steps) > 0).astype(np.float64)
    smallest = schedule.posterior_log_variance_clipped
    return _rows(
        schedule,
        x0_coef=schedule.posterior_mean_coef1,
        x_coef=schedule.posterior_mean_coef2,
        max_log_variance=noisy * (schedule.log_betas if learned_variance else smallest),
        min_log_variance=noisy * smallest,
        learned=noisy,
        eps_variance=zero,
        sigma_unit=zero,
    )


def ddim_rows(schedule: Schedule) -> NDArray[np.float32]:
    """Rows of DDIM, (steps, len(ROW_COLUMNS)) float32, noisiest first.

    eta = 0 is deterministic, eta = 1 has the variance β̃ of DDPM.
    """
    zero = np.zeros(schedule.steps)
    before, now = schedule.alphas_cumprod_prev, schedule.alphas_cumprod
    return _rows(
        schedule,
        x0_coef=np.sqrt(before),
        x_coef=zero,
        max_log_variance=zero,
        min_log_variance=zero,
        learned=zero,
        eps_variance=1.0 - before,
        sigma_unit=np.sqrt((1.0 - before) / (1.0 - now)) * np.sqrt(1.0 - now / before),
    )


def _rows(schedule: Schedule, **columns: F64) -> NDArray[np.float32]:
    """Stack the columns in order and turn them noisiest first; the one rounding, float64 to float32, is here."""
    columns |= {
        "timestep": schedule.timestep_map.astype(np.float64),
        "recip": schedule.sqrt_recip_alphas_cumprod,
        "recipm1": schedule.sqrt_recipm1_alphas_cumprod,
    }
    table_SR = np.stack([columns[name] for name in ROW_COLUMNS], axis=1)
    return np.ascontiguousarray(table_SR[::-1].astype(np.float32))
