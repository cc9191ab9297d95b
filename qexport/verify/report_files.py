"""Writing reports into a bundle: whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from qexport.hidden import meant_by, replacing
from qexport.verify.checks import Skipped
from qexport.verify.report import VerifyReport
from qexport.verify.report_html import render

JSON_NAME = "verify.json"
HTML_NAME = "verify.html"
SKIPPED = "report files"
"""How the report names this, where it could not be done."""


def write_reports(report: VerifyReport, folder: Path) -> None:
    """Write ``verify.json`` and ``verify.html``; where that cannot be done, the report notes it as skipped."""
    try:
        folder.mkdir(exist_ok=True)
        _write(folder / HTML_NAME, render(report))
        _write(folder / JSON_NAME, json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
        report.html = folder / HTML_NAME
    except OSError as error:
        where = meant_by(str(error.filename or folder))
        report.skipped.append(Skipped(SKIPPED, f"{where}: {(error.strerror or str(error)).lower()}"))


def _write(path: Path, text: str) -> None:
    """Whole or not at all, so that a reader sees the old report or the new one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
