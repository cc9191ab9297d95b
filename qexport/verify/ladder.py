"""The ladder: every check of a bundle, in the order in which a failure explains the next one.

    integrity → structure, weights → trajectories (logits, states, draws, images) → placement → quality → speed

Parity runs under ``exact`` session options, quality and speed under ``serve``, and no figure mixes the two. A rung that
needs the model's checkpoint is skipped, and listed so, where it is not at hand.
"""

from __future__ import annotations

from pathlib import Path

from qexport.bundle import Bundle
from qexport.errors import BundleError, InputError
from qexport.family import FeatureExtractor, Generator
from qexport.runtime.session import choose_provider
from qexport.verify.checks import Place, Progress, failed
from qexport.verify.environment import describe_environment
from qexport.verify.images import open_images
from qexport.verify.report import VerifyReport
from qexport.verify.report_files import write_reports
from qexport.verify.rungs import (
    Climb,
    add_decision,
    add_pictures,
    add_speed,
    check_frechet,
    check_placement,
    check_quality,
    check_trajectories,
    check_weights,
    choose_effort,
    describe_bundle,
    find_models,
)


def verify(
    bundle_path: str | Path,
    *,
    generator: Generator | None = None,
    provider: str = "auto",
    samples: int | None = None,
    batch: int = 16,
    seed: int = 0,
    schedule: str | None = None,
    target: str | None = None,
    images: str | Path | None = None,
    every: int = 1,
    quality: bool = False,
    fd_images: int = 1000,
    extractor: FeatureExtractor | None = None,
    max_kl: float | None = None,
    max_fd: float | None = None,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    speed: bool = True,
    reports: bool = True,
    progress: Progress | None = None,
) -> VerifyReport:
    """Verify a bundle; `VerifyReport.passed` says whether it is good.

    Args:
        bundle_path: the bundle.
        generator: the full-precision model, if it is loaded already; it is not changed.
        provider: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        samples: trajectories that are compared step by step, and samples for the quality figures without `images`.
            None takes what the model says of itself (`qexport.family.Effort`); the report states the number.
        batch: most images at a time; bounds the memory.
        seed: of trajectories, drawn samples and generated images.
        schedule: by which of the plan's schedules trajectories run; None takes what the model says of itself, or else
            the plan's default.
        target: verify the graphs that were lowered to it, in place of the portable ones.
        images: real images for the quality figures: an .npz or a folder (see `qexport.verify.images`).
        every: take every n-th of them only.
        quality: also generate `fd_images` images and measure their Fréchet distance.
        fd_images: see `quality`.
        extractor: gives the features of that distance and the statistics of real images; None takes the model's own.
        max_kl: fail above this KL(fp ‖ quantised), nats per token. None only reports it.
        max_fd: fail above this Fréchet distance; implies `quality`. None only reports it.
        checkpoint: file of the generator's weights, where it is neither bundled nor downloaded.
        vae_checkpoint: file of the decoder's weights.
        speed: also measure latency.
        reports: write ``verify.json`` and ``verify.html`` into the bundle's ``reports/``.
        progress: told how far it is.

    Raises:
        InputError: there is no bundle, the images cannot be read, or the provider cannot be used. A damaged bundle is a
            failed check and not an error.
    """
    if batch < 1 or (samples is not None and samples < 1):
        raise InputError(f"{samples} samples in batches of {batch}; both must be at least 1")
    chosen = choose_provider(provider)
    report = VerifyReport(bundle=str(bundle_path), environment=describe_environment(chosen))
    report.settings = {"batch": batch, "seed": seed, "provider": chosen}
    tell = progress or (lambda stage, done, total: None)
    tell("integrity", 0, 1)
    try:
        bundle = Bundle.open(bundle_path, "full")
    except BundleError as error:
        report.checks.append(failed("integrity", Place(node=str(error).partition(":")[0]), str(error)))
        return report
    if schedule is not None:
        bundle.plan.with_schedule(schedule)  # an unknown one is said before the slow part
    if target is not None:
        bundle.graph_files(target)  # likewise one that the bundle was not lowered to
        report.settings["target"] = target
    climb = Climb(bundle, chosen, report, tell, batch, seed, target)
    describe_bundle(climb)
    info = bundle.manifest.model
    given = open_images(images, size=info.image_size, num_classes=info.num_classes, every=every) if images else None
    models = find_models(climb, generator, checkpoint, vae_checkpoint)
    choose_effort(climb, models, samples, schedule)
    if max_kl is not None and models is not None and models.full.draw is None:
        raise InputError(f"a limit on KL has no meaning for {info.name}, which draws no tokens; leave it out")
    check_weights(climb, models)
    check_trajectories(climb, models)
    check_placement(climb)
    drawn = check_quality(climb, models, given, max_kl)
    if quality or max_fd is not None:
        check_frechet(climb, models, extractor, fd_images, max_fd, schedule)
    if speed:
        add_speed(climb)
    if reports:
        tell("report", 0, 1)
        add_pictures(climb, models, drawn)
        add_decision(climb)
        write_reports(report, bundle.reports)
    tell("report", 1, 1)
    return report
