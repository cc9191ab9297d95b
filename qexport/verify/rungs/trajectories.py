"""Trajectories played on both sides, under ``exact``, and every call of them compared."""

from __future__ import annotations

from onnxruntime import OrtValue

from qexport.errors import UnsupportedError
from qexport.family import Generator
from qexport.runtime import Player
from qexport.verify.integer_convolutions import check_integer_convolutions
from qexport.verify.limits import Limits, limits_for, with_half_decoder
from qexport.verify.operators import check_operators
from qexport.verify.reference import Models
from qexport.verify.rounding import Departures, half_limits_from, limits_from, measure_departures
from qexport.verify.rungs.climb import PICTURES, Climb
from qexport.verify.targets import compute_dtype, has_half_decoder
from qexport.verify.trajectory import TrajectoryResult, compare_trajectories
from qexport.verify.trajectory_checks import UNROUNDED, trajectory_checks
from qexport.verify.unrounded import unrounded_player
from qexport.verify.weights import open_graphs


def check_trajectories(climb: Climb, models: Models | None) -> None:
    """Play on both sides and compare every call."""
    if models is None:
        return
    limits = _limits(climb)
    runtime = climb.runtime("exact")
    if limits is None or runtime is None:
        return
    if models.activations:
        if climb.target is None:
            _check_unrounded(climb, models, limits)
            check_each_operator(climb, models)
        else:
            check_integers(climb, models, climb.target)
            climb.skip("quantised operators one by one", "of the portable graphs only; verify without --target")
        departures = climb.attempt("the model's own departure", lambda: _departures(climb, models))
        if departures is None:
            return
        half = limits.kl is not None  # float16: limits of weight-only graphs have no KL in float32
        found = half_limits_from(departures, models.quantised, limits) if half else None
        limits = found or limits_from(departures, models.quantised)
    reference, divergence = models.quantised, limits.kl is not None
    if has_half_decoder(climb.bundle, climb.target):
        limits = with_half_decoder(limits)
    result = climb.attempt("trajectories", lambda: _compare(climb, reference, runtime.player, divergence))
    if result is None:
        return
    climb.report.trajectories = result.to_json()
    for graph, group in result.differences.groups():
        climb.report.error_per_call[f"{graph}/{group}"] = result.differences.per_iteration(graph, group)
    climb.report.checks += trajectory_checks(result, limits, climb.bundle.plan, reference.draw)
    climb.report.pictures = dict(result.pictures)


def check_each_operator(climb: Climb, models: Models) -> None:
    """Each quantised operator against float64, on what it saw."""
    check = climb.attempt(
        "quantised operators",
        lambda: check_operators(
            climb.bundle,
            open_graphs(climb.bundle),
            models.layers,
            models.activations,
            models.per_step,
            models.quantised,
            climb.provider,
            seed=climb.seed,
            schedule=climb.effort.schedule,
            progress=lambda done, total: climb.tell("operators", done, total),
        ),
    )
    if check is not None:
        climb.report.checks.append(check)


def check_integers(climb: Climb, models: Models, target: str) -> None:
    """Each integer convolution of a target's graphs against float64, on what it saw."""
    check = climb.attempt(
        "integer convolutions",
        lambda: check_integer_convolutions(
            climb.bundle,
            target,
            open_graphs(climb.bundle),
            models.layers,
            models.activations,
            models.outputs,
            models.quantised,
            climb.provider,
            seed=climb.seed,
            schedule=climb.effort.schedule,
            progress=lambda done, total: climb.tell("operators", done, total),
        ),
    )
    if check is not None:
        climb.report.checks.append(check)


def _limits(climb: Climb) -> Limits | None:
    """The limits for this bundle; None, and the rung listed as skipped, where there are none."""
    try:
        return limits_for(compute_dtype(climb.bundle, climb.target))
    except UnsupportedError as error:
        climb.skip("trajectories", str(error))
        return None


def _check_unrounded(climb: Climb, models: Models, limits: Limits) -> None:
    """The same trajectories with the quantisers of activations taken out, on both sides."""
    reference = models.unrounded

    def compare() -> TrajectoryResult:
        player = unrounded_player(
            climb.bundle, models.layers, models.activations, models.outputs, reference, climb.provider
        )
        return _compare(climb, reference, player, False)

    result = climb.attempt("trajectories without rounding", compare)
    if result is not None:
        climb.report.checks += trajectory_checks(result, limits, reference.plan, reference.draw, UNROUNDED)


def _departures(climb: Climb, models: Models) -> Departures:
    """See `qexport.verify.rounding`."""
    climb.tell("rounding", 0, 1)
    samples, schedule = climb.effort.samples, climb.effort.schedule
    return measure_departures(models.quantised, models.unrounded, samples=samples, seed=climb.seed, schedule=schedule)


def _compare(climb: Climb, reference: Generator, player: Player[OrtValue], divergence: bool) -> TrajectoryResult:
    """See `compare_trajectories`."""
    return compare_trajectories(
        reference,
        player,
        samples=climb.effort.samples,
        batch=climb.batch,
        seed=climb.seed,
        schedule=climb.effort.schedule,
        pictures=PICTURES,
        divergence=divergence,
        progress=lambda done, total: climb.tell("trajectories", done, total),
    )
