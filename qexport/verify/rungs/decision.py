"""Why the bundle is quantised as it is, for the HTML report: methods compared, sensitivity of the layers.

These files are not hashed: what cannot be read is listed as skipped and fails nothing.
"""

from __future__ import annotations

import json

from qexport.bundle.reports import COMPARE_REPORT, SENSITIVITY_PLOT
from qexport.verify.rungs.climb import Climb


def add_decision(climb: Climb) -> None:
    """Take the comparison and the plot into the report, where the bundle has them."""
    folder, report = climb.bundle.reports, climb.report
    try:
        if (folder / COMPARE_REPORT).is_file():
            report.compared = json.loads((folder / COMPARE_REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        climb.skip("methods compared", f"{COMPARE_REPORT} cannot be read: {error}")
    try:
        if (folder / SENSITIVITY_PLOT).is_file():
            report.sensitivity_svg = (folder / SENSITIVITY_PLOT).read_bytes()
    except OSError as error:
        climb.skip("sensitivity of the layers", f"{SENSITIVITY_PLOT} cannot be read: {error}")
