"""How far from the full-precision model, under ``serve``."""

from __future__ import annotations

import numpy as np

from qexport.errors import UnsupportedError
from qexport.runtime import Runtime
from qexport.verify.checks import NOWHERE, at_most
from qexport.verify.decoder import decoder_psnr_db
from qexport.verify.denoise_rung import DenoiserQuality, measure_denoiser
from qexport.verify.images import ImageSet
from qexport.verify.quality import Quality, drawn_by, measure_quality, runtime_student, tokens_of
from qexport.verify.reference import Models
from qexport.verify.rungs.climb import PICTURES, Climb


def check_quality(
    climb: Climb, models: Models | None, images: ImageSet | None, max_kl: float | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """The figures of quality, and the limit on KL where there is one.

    Returns:
        The images of the full-precision model and of the bundle (b, 3, H, W), where they had to be generated for it.
    """
    if models is None:
        return None
    runtime = climb.runtime("serve")
    if runtime is None:
        return None
    try:
        found = climb.attempt("quality", lambda: _measure(climb, models, runtime, images))
    except UnsupportedError as error:
        climb.skip("quality", str(error))
        return None
    if found is None:
        return None
    climb.report.quality.update(found.to_json())
    psnr = climb.attempt("decoder", lambda: decoder_psnr_db(models.full, runtime, samples=PICTURES, seed=climb.seed))
    if psnr is not None:
        climb.report.quality["decoder_psnr_db"] = psnr
    if isinstance(found, DenoiserQuality):
        return found.full, found.quantised
    if max_kl is not None:
        detail = f"{found.source}, under serve"
        climb.report.checks.append(at_most("KL(fp‖quantised)", found.figures["kl"], max_kl, NOWHERE, detail, "nats"))
    return None


def _measure(climb: Climb, models: Models, runtime: Runtime, images: ImageSet | None) -> Quality | DenoiserQuality:
    """See `measure_quality` and `measure_denoiser`."""
    full, samples = models.full, climb.effort.samples
    if full.draw is None:
        return measure_denoiser(
            full,
            runtime.player,
            images,
            samples=samples,
            seed=climb.seed,
            batch=climb.batch,
            schedule=climb.effort.schedule,
            tables=climb.bundle.tables(),
            progress=lambda done: climb.tell("quality", done, samples),
        )
    count = len(images) if images else samples
    batches = tokens_of(full, images, climb.batch) if images else drawn_by(full, count, climb.seed, climb.batch)
    return measure_quality(
        full,
        runtime_student(runtime.player, full.draw, climb.bundle.tables()),
        batches,
        on_images=images is not None,
        seed=None if images else climb.seed,
        source=images.source if images else f"{count} samples that the full-precision model drew, unguided",
        progress=lambda done: climb.tell("quality", done, count),
    )
