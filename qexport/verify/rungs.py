"""The rungs of the ladder. Each adds its checks and figures to the report; none stops the others.

A bundle that turns out not to be what it should be (`BundleError`) is a failed check of the rung that noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from onnxruntime import OrtValue

from qexport.bundle import Bundle
from qexport.bundle.calibration import CALIBRATION
from qexport.errors import BundleError, UnsupportedError
from qexport.family import Effort, Generator
from qexport.reference.backend import torch_player
from qexport.runtime import Player, Runtime, load
from qexport.verify.activation_checks import check_activations
from qexport.verify.checks import NOWHERE, Place, Progress, Skipped, at_most, failed
from qexport.verify.decoder import decoder_psnr_db
from qexport.verify.denoise_rung import DenoiserQuality, measure_denoiser
from qexport.verify.fd import measure_fd
from qexport.verify.images import ImageSet
from qexport.verify.limits import Limits, limits_for
from qexport.verify.operators import check_operators
from qexport.verify.placement import HEAVY_OPS, Placement, check_fusion, measure_placement
from qexport.verify.quality import Quality, drawn_by, measure_quality, runtime_student, tokens_of
from qexport.verify.reference import Models, check_plan, load_models
from qexport.verify.report import VerifyReport
from qexport.verify.rounding import Departures, half_limits_from, limits_from, measure_departures
from qexport.verify.solved_codes import check_solved
from qexport.verify.speed import BUDGET_S, measure_speed, peak_memory_bytes
from qexport.verify.targets import compute_dtype
from qexport.verify.trajectory import TrajectoryResult, compare_trajectories, label_inputs, labels_for
from qexport.verify.trajectory_checks import UNROUNDED, trajectory_checks
from qexport.verify.unrounded import unrounded_player
from qexport.verify.weights import check_layers, check_others, check_structure, layers_of_manifest, open_graphs

PICTURES = 10
"""Images of each side in the HTML report."""

_T = TypeVar("_T")


class Rungs:
    """Climbs the rungs over one bundle; sessions are made once for each option set."""

    def __init__(
        self,
        bundle: Bundle,
        provider: str,
        report: VerifyReport,
        tell: Progress,
        batch: int,
        seed: int,
        target: str | None = None,
    ) -> None:
        self.target = target
        self.bundle, self.provider, self.report, self.tell = bundle, provider, report, tell
        self.batch, self.seed = batch, seed
        self.effort = Effort()
        self._runtimes: dict[str, Runtime | None] = {}
        self._drawn: tuple[np.ndarray, np.ndarray] | None = None
        manifest = bundle.manifest
        report.source = manifest.model.source
        report.model, report.scheme, report.digest = manifest.model.name, manifest.scheme, manifest.digest
        report.totals, report.size_bytes = manifest.totals, bundle.size_bytes
        report.bits_per_weight = manifest.totals.get("bits_per_weight_quantized") or manifest.totals.get(
            "bits_per_weight_all"
        )
        report.layers = [dict(row) for row in manifest.layers]
        detail = f"{len(manifest.files)} files, {bundle.size_bytes:,} bytes, every hash as in the manifest"
        report.checks.append(at_most("integrity", 0, 0, NOWHERE, detail, "files altered"))

    def load(self, generator: Generator | None, checkpoint: str | None, vae_checkpoint: str | None) -> Models | None:
        """The models to compare with, or None, and the rungs that need them listed as skipped."""
        self.tell("reference", 0, 1)
        try:
            models = load_models(self.bundle, generator, checkpoint, vae_checkpoint)
        except BundleError as error:
            self.report.checks.append(failed("calibration", Place(node=CALIBRATION), str(error)))
            return None
        if isinstance(models, str):
            self.skip("weights, trajectories, quality", models)
            return None
        return models

    def choose_effort(self, models: Models | None, samples: int | None, schedule: str | None) -> None:
        """What was asked for, else what the model says of itself."""
        known = models.full.effort if models else Effort()
        plan = self.bundle.plan
        default = known.schedule if known.schedule in plan.schedules else None
        self.effort = Effort(samples or known.samples, schedule or default)
        played = self.effort.schedule or plan.schedule
        self.report.settings |= {"samples": self.effort.samples, **({"schedule": played} if played else {})}

    def weights(self, models: Models | None) -> None:
        """Are the layers quantised, and do the files hold what the reference computes with?"""
        self.tell("weights", 0, 1)
        checks = self.report.checks
        graphs = self.attempt("graphs parsed", lambda: open_graphs(self.bundle))
        if graphs is None:
            return
        if models is None:
            checks.append(check_structure(graphs, layers_of_manifest(self.bundle)))
            return
        checks.append(check_structure(graphs, models.layers))
        checks.append(check_layers(graphs, models.layers, models.unrounded))
        checks.append(check_others(graphs, models.layers, models.unrounded))
        solved = check_solved(models.solved, self.bundle.manifest.layers)
        if solved is not None:
            checks.append(solved)
        if models.activations:
            checks.append(check_activations(graphs, models.layers, models.activations, models.per_step))
        checks.append(check_plan(self.bundle, models.quantised))

    def trajectories(self, models: Models | None) -> None:
        """Play on both sides and compare every call."""
        if models is None:
            return
        limits = self.limits()
        runtime = self.runtime("exact")
        if limits is None or runtime is None:
            return
        if models.activations:
            if self.target is None:
                self.unrounded(models, limits)
                self.operators(models)
            else:
                self.skip("quantised operators one by one", "of the portable graphs only; verify without --target")
            departures = self.attempt("the model's own departure", lambda: self.departures(models))
            if departures is None:
                return
            half = limits.kl is not None  # float16: limits of weight-only graphs have no KL in float32
            found = half_limits_from(departures, models.quantised, limits) if half else None
            limits = found or limits_from(departures, models.quantised)
        reference, divergence = models.quantised, limits.kl is not None
        result = self.attempt("trajectories", lambda: self.compare(reference, runtime.player, divergence))
        if result is None:
            return
        self.report.trajectories = result.to_json()
        for graph, group in result.differences.groups():
            self.report.error_per_call[f"{graph}/{group}"] = result.differences.per_iteration(graph, group)
        self.report.checks += trajectory_checks(result, limits, self.bundle.plan, reference.draw)
        self.report.pictures = dict(result.pictures)

    def unrounded(self, models: Models, limits: Limits) -> None:
        """The same trajectories with the quantisers of activations taken out, on both sides."""
        reference = models.unrounded

        def compare() -> TrajectoryResult:
            player = unrounded_player(self.bundle, models.layers, models.activations, reference, self.provider)
            return self.compare(reference, player, False)

        result = self.attempt("trajectories without rounding", compare)
        if result is not None:
            self.report.checks += trajectory_checks(result, limits, reference.plan, reference.draw, UNROUNDED)

    def operators(self, models: Models) -> None:
        """Each quantised operator against float64, on what it saw."""
        check = self.attempt(
            "quantised operators",
            lambda: check_operators(
                self.bundle,
                open_graphs(self.bundle),
                models.layers,
                models.activations,
                models.per_step,
                models.quantised,
                self.provider,
                seed=self.seed,
                schedule=self.effort.schedule,
                progress=lambda done, total: self.tell("operators", done, total),
            ),
        )
        if check is not None:
            self.report.checks.append(check)

    def departures(self, models: Models) -> Departures:
        """See `qexport.verify.rounding`."""
        self.tell("rounding", 0, 1)
        samples, schedule = self.effort.samples, self.effort.schedule
        return measure_departures(
            models.quantised, models.unrounded, samples=samples, seed=self.seed, schedule=schedule
        )

    def compare(self, reference: Generator, player: Player[OrtValue], divergence: bool) -> TrajectoryResult:
        """See `compare_trajectories`."""
        return compare_trajectories(
            reference,
            player,
            samples=self.effort.samples,
            batch=self.batch,
            seed=self.seed,
            schedule=self.effort.schedule,
            pictures=PICTURES,
            divergence=divergence,
            progress=lambda done, total: self.tell("trajectories", done, total),
        )

    def placement(self) -> None:
        """What ran where, and what was fused."""
        self.tell("placement", 0, 1)
        placement = self.attempt("placement", lambda: measure_placement(self.bundle, self.provider, target=self.target))
        if placement is None:
            return
        self.report.placement = placement.to_json()
        forms, exact = placement.forms("serve"), placement.forms("exact")
        for row in self.report.layers:
            row["fused_form"] = forms.get(str(row.get("name")))
            row["fused_form_exact"] = exact.get(str(row.get("name")))
        self.fallback(placement)
        self.report.checks.append(check_fusion(placement, self.bundle.manifest.layers))

    def fallback(self, placement: Placement) -> None:
        """Did anything that matters run on the CPU unasked?"""
        heavy = [node for node in placement.fallback if node[1] in HEAVY_OPS]
        place = Place(heavy[0][0]) if heavy else NOWHERE
        detail = (
            f"{len(placement.fallback)} nodes on the CPU in all" if placement.provider != "cpu" else "all on the CPU"
        )
        if heavy:
            detail = f"{heavy[0][1]} {heavy[0][2]!r} ran on the CPU; {detail}"
        name = "matrix operations that fell back to the CPU"
        self.report.checks.append(at_most(name, len(heavy), 0, place, detail, "nodes"))

    def quality(self, models: Models | None, images: ImageSet | None, max_kl: float | None) -> None:
        """How far from the full-precision model, under ``serve``."""
        if models is None:
            return
        runtime = self.runtime("serve")
        if runtime is None:
            return
        try:
            found = self.attempt("quality", lambda: self.measure(models, runtime, images))
        except UnsupportedError as error:
            self.skip("quality", str(error))
            return
        if found is None:
            return
        self.report.quality.update(found.to_json())
        psnr = self.attempt("decoder", lambda: decoder_psnr_db(models.full, runtime, samples=PICTURES, seed=self.seed))
        if psnr is not None:
            self.report.quality["decoder_psnr_db"] = psnr
        if isinstance(found, DenoiserQuality):
            self._drawn = found.full, found.quantised
        elif max_kl is not None:
            detail = f"{found.source}, under serve"
            self.report.checks.append(at_most("KL(fp‖quantised)", found.figures["kl"], max_kl, NOWHERE, detail, "nats"))

    def measure(self, models: Models, runtime: Runtime, images: ImageSet | None) -> Quality | DenoiserQuality:
        """See `measure_quality` and `measure_denoiser`."""
        full, samples = models.full, self.effort.samples
        if full.draw is None:
            return measure_denoiser(
                full,
                runtime.player,
                images,
                samples=samples,
                seed=self.seed,
                batch=self.batch,
                schedule=self.effort.schedule,
                tables=self.bundle.tables(),
                progress=lambda done: self.tell("quality", done, samples),
            )
        count = len(images) if images else samples
        batches = tokens_of(full, images, self.batch) if images else drawn_by(full, count, self.seed, self.batch)
        return measure_quality(
            full,
            runtime_student(runtime.player, full.draw, self.bundle.tables()),
            batches,
            on_images=images is not None,
            seed=None if images else self.seed,
            source=images.source if images else f"{count} samples that the full-precision model drew, unguided",
            progress=lambda done: self.tell("quality", done, count),
        )

    def frechet(self, models: Models | None, count: int, max_fd: float | None, schedule: str | None) -> None:
        """FD of generated images, under ``serve``, by the plan's schedule unless another was asked for."""
        runtime = self.runtime("serve")
        extractor = models.full.features if models else None
        if runtime is None or models is None:
            return
        if extractor is None:
            self.skip("FD", f"{models.full.entry.name} has no feature extractor")
            return
        calls = (runtime.player.with_schedule(schedule) if schedule else runtime.player).calls
        batches = runtime.batches(
            labels_for(count, models.full.entry.num_classes),
            seed=self.seed,
            batch=self.batch,
            schedule=schedule,
            progress=lambda done, total: self.tell("FD", done // calls, total // calls),
        )
        found = self.attempt("FD", lambda: measure_fd(batches, extractor, self.seed))
        if found is None:
            return
        self.report.quality["fd"] = found.to_json()
        if max_fd is not None:
            detail = f"{count} images, seed {self.seed}, 95 % interval {found.low:.3g} … {found.high:.3g}, under serve"
            self.report.checks.append(at_most(f"FD ({found.name})", found.value, max_fd, NOWHERE, detail))

    def speed(self) -> None:
        """Latency under ``serve``, and peak memory."""
        self.tell("speed", 0, 1)
        runtime = self.runtime("serve")
        speed = self.attempt("speed", lambda: measure_speed(runtime, self.effort.schedule)) if runtime else None
        if speed is not None:
            self.report.latency_ms = speed.to_json()
            for size in speed.left_out:
                self.skip(f"speed of batch {size}", f"it would take more than {BUDGET_S:.0f} s")
        self.report.peak_memory_bytes = peak_memory_bytes()

    def pictures(self, models: Models | None) -> None:
        """The same seeds from the full-precision model and under ``serve``, beside those of the trajectories."""
        runtime = self.runtime("serve")
        if models is None or runtime is None or not self.report.pictures:
            return
        count = min(PICTURES, self.effort.samples, self.batch)
        if self._drawn is not None:
            full, serve = (images[:count] for images in self._drawn)
        else:
            inputs = label_inputs(self.bundle.plan, labels_for(count, models.full.entry.num_classes))
            full = torch_player(models.full).play(inputs, seed=self.seed)
            serve = self.attempt("pictures", lambda: runtime.player.play(inputs, seed=self.seed))
        self.report.pictures = {"torch, full precision": full, **self.report.pictures}
        if serve is not None:
            self.report.pictures["ONNX Runtime, serve"] = serve

    def limits(self) -> Limits | None:
        """The limits for this bundle; None, and the rung listed as skipped, where there are none."""
        try:
            return limits_for(compute_dtype(self.bundle, self.target))
        except UnsupportedError as error:
            self.skip("trajectories", str(error))
            return None

    def runtime(self, options: str) -> Runtime | None:
        """The bundle's sessions under an option set, made once; None if it cannot be loaded (a failed check)."""
        if options not in self._runtimes:
            self._runtimes[options] = self.attempt(
                f"graphs load ({options})",
                lambda: load(
                    self.bundle.path, provider=self.provider, options=options, target=self.target, check="size"
                ),
            )
        return self._runtimes[options]

    def attempt(self, name: str, action: Callable[[], _T]) -> _T | None:
        """The result of `action`, or None and a failed check if the bundle is not what it should be."""
        try:
            return action()
        except BundleError as error:
            text = str(error)
            named = [g for g in self.bundle.plan.graphs if f"{g!r}" in text or self.bundle.manifest.graphs[g] in text]
            self.report.checks.append(failed(name, Place(named[0]) if named else NOWHERE, text))
            return None

    def skip(self, name: str, reason: str) -> None:
        """List a rung that is not climbed."""
        self.report.skipped.append(Skipped(name, reason))
