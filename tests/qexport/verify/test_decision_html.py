"""Why a bundle is quantised as it is, in ``verify.html``: read from files that nobody vouches for."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qexport.verify.report import VerifyReport
from qexport.verify.report_html import render
from qexport.verify.rungs.decision import add_decision

ROWS = [
    {"method": "rtn", "kl": 0.051, "top1_agreement": 0.8, "bits_per_weight": 4.5, "sqnr_db": 20.1, "seconds": 1.5},
    {"method": "<b>", "kl": 0.0123, "top1_agreement": 0.9, "bits_per_weight": 4.5, "sqnr_db": 21.0, "seconds": 3.0},
]
COMPARED = {"model": "m", "scheme": "w4a16", "merit": "kl", "chosen": "<b>", "rows": ROWS}
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


def climbed(folder: Path, **files: bytes) -> VerifyReport:
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data)
    report, skipped = VerifyReport("bundle"), []
    climb: Any = SimpleNamespace(
        bundle=SimpleNamespace(reports=folder), report=report, skip=lambda *given: skipped.append(given)
    )
    add_decision(climb)
    report.settings["skipped"] = skipped
    return report


def test_both_are_shown_and_nothing_in_them_is_run(tmp_path: Path) -> None:
    html = render(climbed(tmp_path, compare_json=json.dumps(COMPARED).encode(), sensitivity_svg=SVG))
    assert "<h2>Methods compared: w4a16</h2>" in html
    assert "<code>rtn</code></td><td><span class=n>0.051</span></td><td><span class=n>0.8</span>" in html
    assert "<code>&lt;b&gt;</code> ←</td><td><span class=n>0.0123</span>" in html
    assert f'src="data:image/svg+xml;base64,{base64.b64encode(SVG).decode()}"' in html
    assert "<script" not in html
    assert "<svg" not in html


def test_without_them_there_is_no_section(tmp_path: Path) -> None:
    html = render(climbed(tmp_path))
    assert "Methods compared" not in html
    assert "Sensitivity" not in html


def test_damage_is_said(tmp_path: Path) -> None:
    report = climbed(tmp_path, compare_json=b"{")
    ((what, why),) = report.settings["skipped"]
    assert what == "methods compared"
    assert "compare.json cannot be read" in why
    for odd in ([], {"merit": "kl"}, {**COMPARED, "rows": []}, {**COMPARED, "rows": [{**ROWS[0], "kl": "x"}]}, 3):
        html = render(climbed(tmp_path, compare_json=json.dumps(odd).encode()))
        assert odd == [] or "compare.json is malformed" in html, odd


def test_notes_of_the_manifest_are_shown(tmp_path: Path) -> None:
    report = climbed(tmp_path)
    report.notes = ["3 layers <with> zeros"]
    assert "<li>3 layers &lt;with&gt; zeros</li>" in render(report)
    assert report.to_json()["notes"] == report.notes
