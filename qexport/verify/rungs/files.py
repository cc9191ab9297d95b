"""What the files hold: integrity, structure, weights."""

from __future__ import annotations

from qexport.verify.activation_checks import check_activations, check_outputs
from qexport.verify.checks import NOWHERE, at_most
from qexport.verify.reference import Models, check_plan
from qexport.verify.rungs.climb import Climb
from qexport.verify.solved_codes import check_solved
from qexport.verify.trained_floats import check_floats
from qexport.verify.weights import check_layers, check_others, check_structure, layers_of_manifest, open_graphs


def describe_bundle(climb: Climb) -> None:
    """The head of the report. The bundle was opened, so its hashes are right: that is the first check."""
    bundle, report = climb.bundle, climb.report
    manifest = bundle.manifest
    report.source = manifest.model.source
    report.model, report.scheme, report.digest = manifest.model.name, manifest.scheme, manifest.digest
    report.totals, report.size_bytes = manifest.totals, bundle.size_bytes
    report.bits_per_weight = manifest.totals.get("bits_per_weight_quantized") or manifest.totals.get(
        "bits_per_weight_all"
    )
    report.notes = [note["text"] for note in manifest.notes]
    report.layers = [dict(row) for row in manifest.layers]
    detail = f"{len(manifest.files)} files, {bundle.size_bytes:,} bytes, every hash as in the manifest"
    report.checks.append(at_most("integrity", 0, 0, NOWHERE, detail, "files altered"))


def check_weights(climb: Climb, models: Models | None) -> None:
    """Are the layers quantised, and do the files hold what the reference computes with?"""
    climb.tell("weights", 0, 1)
    checks = climb.report.checks
    graphs = climb.attempt("graphs parsed", lambda: open_graphs(climb.bundle))
    if graphs is None:
        return
    if models is None:
        checks.append(check_structure(graphs, layers_of_manifest(climb.bundle)))
        return
    checks.append(check_structure(graphs, models.layers))
    checks.append(check_layers(graphs, models.layers, models.unrounded))
    checks.append(check_others(graphs, models.layers, models.unrounded))
    solved = check_solved(models.solved, climb.bundle.manifest.layers)
    if solved is not None:
        checks.append(solved)
    floats = check_floats(models.floats, climb.bundle.manifest)
    if floats is not None:
        checks.append(floats)
    if models.activations:
        checks.append(check_activations(graphs, models.layers, models.activations, models.per_step))
    if models.outputs:
        checks.append(check_outputs(graphs, models.layers, models.outputs))
    checks.append(check_plan(climb.bundle, models.quantised))
