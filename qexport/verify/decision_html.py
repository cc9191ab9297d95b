"""The part of ``verify.html`` that says why the bundle is quantised as it is.

Both figures are the choice's own: of other samples than the checks, and measured in torch.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from qexport.verify.html import number, section, table
from qexport.verify.report import VerifyReport

_MERITS = {"kl": "KL, nats", "output_mse": "output error"}


def decision_html(report: VerifyReport) -> str:
    """Sections with the methods that were compared and the sensitivity of the layers; empty where there are none."""
    return _compared(report.compared) + _sensitivity(report.sensitivity_svg)


def _compared(data: Any) -> str:
    try:
        return _methods(data) if data else ""
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # nobody vouches for the file
        return section("Methods compared", f'<div class="note">compare.json is malformed: {escape(str(error))}</div>')


def _methods(data: Mapping[str, Any]) -> str:
    merit, chosen = str(data["merit"]), data["chosen"]
    rows = [
        (
            f"<code>{escape(str(row['method']))}</code>" + (" ←" if row["method"] == chosen else ""),
            *(
                f"<span class=n>{number(None if row.get(key) is None else float(row[key]))}</span>"
                for key in (merit, "top1_agreement", "bits_per_weight", "sqnr_db", "seconds")
            ),
        )
        for row in data["rows"]
    ]
    heads = ("method", _MERITS.get(merit, escape(merit)), "top-1 agreement", "bits/weight", "SQNR, dB", "seconds")
    source = str(data["rows"][0].get("source", ""))
    note = (f"On {source}. " if source else "") + "← is what the bundle holds."
    return section(f"Methods compared: {data['scheme']}", table(heads, rows, "compared"), note)


def _sensitivity(svg: bytes) -> str:
    """As an image: in one, a browser runs no scripts, whoever wrote the file."""
    if not svg:
        return ""
    data = base64.b64encode(svg).decode()
    picture = f'<figure><img alt="sensitivity of the layers" src="data:image/svg+xml;base64,{data}"></figure>'
    return section(
        "Sensitivity of the layers",
        picture,
        "What each layer loses if it alone is quantised; filled is what it was given. Numbers: sensitivity.json.",
    )
