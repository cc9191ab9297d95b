"""What ran where, and what was fused."""

from __future__ import annotations

from qexport.verify.checks import NOWHERE, Check, Place, at_most
from qexport.verify.placement import Placement, check_fusion, measure_placement
from qexport.verify.rungs.climb import Climb


def check_placement(climb: Climb) -> None:
    """What ran where, and what was fused."""
    climb.tell("placement", 0, 1)
    placement = climb.attempt("placement", lambda: measure_placement(climb.bundle, climb.provider, target=climb.target))
    if placement is None:
        return
    climb.report.placement = placement.to_json()
    forms, exact = placement.forms("serve"), placement.forms("exact")
    for row in climb.report.layers:
        row["fused_form"] = forms.get(str(row.get("name")))
        row["fused_form_exact"] = exact.get(str(row.get("name")))
    climb.report.checks.append(_check_fallback(placement))
    climb.report.checks.append(check_fusion(placement, climb.bundle.manifest.layers))


def _check_fallback(placement: Placement) -> Check:
    """Did anything that matters run on the CPU unasked?"""
    heavy = placement.heavy
    place = Place(heavy[0][0]) if heavy else NOWHERE
    detail = f"{len(placement.fallback)} nodes on the CPU in all" if placement.provider != "cpu" else "all on the CPU"
    if heavy:
        detail = f"{heavy[0][1]} {heavy[0][2]!r} ran on the CPU; {detail}"
    name = "operators that fell back to the CPU with their data"
    return at_most(name, len(heavy), 0, place, detail, "nodes")
