"""Every limit that `verify` holds a bundle to, by what is quantised and in which dtype the graph computes.

Where the numbers come from (u = 2⁻²⁴ ≈ 6e-8 is float32's unit round-off):

- A matmul over K terms sums in another order in torch and in ONNX Runtime. Rounding errors of sums behave like a random
  walk, so one layer contributes about u·√(log₂ K) … u·√K of its output, 1e-7 to 3e-6 for K up to 4096; a transformer's
  residual stream adds the layers in quadrature. Ten to thirty layers give 1e-7 … 1e-6 at the logits. The limit of 2e-5
  leaves a factor of 20 for guidance (which subtracts two nearly equal logits), for attention's exponentials and for
  kernels of other machines. It is far below any defect: one scale of one group doubled moves the logits by 1e-3 and
  more, a wrong nibble order by 1e-1.
- A token differs where a boundary between two tokens lies within that logit error. With errors of 1e-6, and 900
  candidates, about 1e-4 of the draws are that near (measured: 1 in 9,920 for inverse CDF), so 2e-3 is never reached by
  rounding, and a systematic shift of boundaries is.
- Where inputs of layers are quantised, these limits hold without that rounding; `qexport.verify.rounding` says what
  holds with it, and `qexport.verify.operators` what holds for each quantised operator.
- Pixels lie in [0, 1], so a relative error of 2e-5 in f_hat is about 1e-5 there; 1e-4 is a fortieth of one grey level.

Graphs that were lowered to float16 round at every node with v = 2⁻¹¹ ≈ 4.9e-4, by 2.8e-4 in the mean square. A block
rounds what flows through it about eight times, D blocks in quadrature, and guidance doubles the error: 2·2.8e-4·√(8·D)
is 2e-3 for the two blocks of the smallest reference models (measured: 1.9e-3 and 1.3e-3) and 9e-3 for thirty. So:

- logits, states and noise predictions 1e-2. That tells a wrong order of codes (1e-1), not one doubled scale of a small
  group; that is what the same target in float32 is for, whose weights are the same bytes.
- KL(torch ‖ ONNX Runtime) of a call: ten times the model's own departure from float64 would be 1e-11, so the floor
  counts: half the square of 1e-2 of logits that spread by 2 nats. Measured: 8.5e-6 where logits are 1.9e-3 off.
- Draws: with 4,096 candidates, 8 % lie that near to a boundary (measured at 1.9e-3; in proportion to the error). Each
  difference still needs its excuse. With quantised inputs half of them differ, so no share would tell anything.
- Free images of a denoiser: a step adds up to 1.2e-3 to a pixel of x (measured), 250 steps in quadrature 2e-2, which is
  five grey levels; measured over 25 steps: 1.3e-3. Autoencoders stay in float32, and under its limit,
  unless asked for:
- Pictures of a decoder in float16: seventeen residual blocks, the most of any decoder here, make by the same rule
  2.8e-4·√(8·17) = 3.3e-3 of what the last convolution gives, which is at most 1, and half of that as a pixel: 1.6e-3.
  The largest of a million pixels lies five deviations out: 8e-3, two grey levels. Measured with every value rounded,
  64 pictures each of var-c10-d2 and dit-c10-d2: 1.1e-4 in the mean square, 8.4e-4 at most. At the end of free
  trajectories it is added to what the model's own float16 does.
- With quantised inputs float16 moves so many codes that their rounding is drawn anew in part, wholly at worst: two
  roundings that know nothing of each other differ by √2 of what one of them does, and no more. Measured: 0.14 of it on
  logits, 0.88 on noise predictions (`qexport.verify.rounding` measures what the rounding does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qexport.errors import UnsupportedError

FP32_LOGITS_RELATIVE_L2 = 2e-5
"""Guided logits of one call on the reference's inputs; see the module."""

FP32_STATE_RELATIVE_L2 = 2e-5
"""Every other floating-point output (feature maps, caches): same sums, same limit."""

FP32_IMAGE_MAX_ABS = 1e-4
"""Largest difference of a pixel in [0, 1] where tokens are identical; see the module."""

EXCUSED_DRAWS = 2e-3
"""Greatest share of draws that may differ with an excuse; see the module."""

FEW_DRAWS = 3
"""So many excused draws never fail: of a few hundred draws, a share of 2e-3 is less than one."""

UNEXCUSED_DRAWS = 0
"""Draws that differ without an excuse: each is a defect."""

INCONSISTENT_DRAWS = 0
"""The reference's own tokens that a float64 computation from its own logits contradicts: each is a defect."""

UNEQUAL_WEIGHTS = 0
"""Weights that are not bit-identical. A code times an fp16 scale is exact in float32, so nothing may differ."""

FP16_RELATIVE_L2 = 1e-2
"""Logits, states and noise predictions in float16; see the module."""

FP16_KL_FLOOR = 2e-4
"""Nats: ½ · (1e-2 · 2)²; see the module."""

FP16_EXCUSED_DRAWS = 0.5
"""Greatest share of draws that may differ with an excuse in float16; see the module."""

FP16_FREE_IMAGE_MAX_ABS = 2e-2
"""Largest difference of a pixel at the end of a free trajectory; see the module."""

FP16_DECODER_IMAGE_MAX_ABS = 8e-3
"""Largest difference of a pixel in [0, 1] that a decoder in float16 makes; see the module."""

FP16_SHARE = math.sqrt(2)
"""Of what all rounding of inputs does, where float16 is added to it; see the module."""


@dataclass(frozen=True)
class Limits:
    """What one kind of bundle is held to; see the constants of this module. `kl` None asks for no divergence."""

    logits_relative_l2: float
    state_relative_l2: float
    image_max_abs: float
    excused_draws: float
    kl: float | None = None
    free_image_max_abs: float | None = None

    @property
    def of_free_images(self) -> float:
        """Largest difference of a pixel at the end of a free trajectory; without rounding, that of a decoded one."""
        return self.image_max_abs if self.free_image_max_abs is None else self.free_image_max_abs


def widest(one: Limits, other: Limits) -> Limits:
    """The wider of each limit."""
    kls = [kl for kl in (one.kl, other.kl) if kl is not None]
    return Limits(
        logits_relative_l2=max(one.logits_relative_l2, other.logits_relative_l2),
        state_relative_l2=max(one.state_relative_l2, other.state_relative_l2),
        image_max_abs=max(one.image_max_abs, other.image_max_abs),
        excused_draws=max(one.excused_draws, other.excused_draws),
        kl=max(kls, default=None),
        free_image_max_abs=max(one.of_free_images, other.of_free_images),
    )


def with_half_decoder(limits: Limits) -> Limits:
    """The same limits for a bundle whose decoder computes in float16."""
    return replace(
        limits,
        image_max_abs=max(limits.image_max_abs, FP16_DECODER_IMAGE_MAX_ABS),
        free_image_max_abs=limits.of_free_images + FP16_DECODER_IMAGE_MAX_ABS,
    )


def limits_for(dtype: str) -> Limits:
    """The limits of graphs that compute in `dtype` and do not round what flows into layers.

    Where they do, these hold for the same graphs without their quantisers (`qexport.verify.rounding`).

    Raises:
        UnsupportedError: no limits were derived for that kind of bundle.
    """
    if dtype == "float16":
        return Limits(
            logits_relative_l2=FP16_RELATIVE_L2,
            state_relative_l2=FP16_RELATIVE_L2,
            image_max_abs=FP32_IMAGE_MAX_ABS,
            excused_draws=FP16_EXCUSED_DRAWS,
            kl=FP16_KL_FLOOR,
            free_image_max_abs=FP16_FREE_IMAGE_MAX_ABS,
        )
    if dtype != "float32":
        raise UnsupportedError(f"verify has no limits for graphs that compute in {dtype}; use float32 or float16")
    return Limits(FP32_LOGITS_RELATIVE_L2, FP32_STATE_RELATIVE_L2, FP32_IMAGE_MAX_ABS, EXCUSED_DRAWS)
