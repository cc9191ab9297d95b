"""What was found: timings, accuracy rows and errors, written as JSON and as Markdown."""

from __future__ import annotations

import contextlib
import json
import platform
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds a run: median, min and max of samples, each the mean of `runs` runs between synchronisations."""

    case: str
    rows: int
    how: str
    cuda_graph: bool
    median_us: float
    min_us: float
    max_us: float
    runs: int


@dataclass
class Report:
    """Everything found, in the order it was found."""

    environment: dict[str, Any] = field(default_factory=dict)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record an exception of one part instead of ending the run."""
        try:
            yield
        except Exception as error:  # the point of a part: the next one goes on
            self.errors.append({"part": name, "error": f"{type(error).__name__}: {error}"[:1500]})
            print(f"FAILED {name}: {self.errors[-1]['error'][:300]}", flush=True)
            traceback.print_exc()


def environment(library: Path) -> dict[str, Any]:
    """Versions and device."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    with contextlib.suppress(ImportError):
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name(0)
        found["cuda"] = torch.version.cuda
    found["library_bytes"] = library.stat().st_size if library.exists() else None
    return found


def table(timings: list[Timing], case: str) -> list[str]:
    """Markdown rows of one case: a line per form, a column per row count."""
    chosen = [t for t in timings if t.case == case]
    columns = sorted({t.rows for t in chosen})
    lines = ["| form | CUDA graph | " + " | ".join(f"M={m}" for m in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for how, graph in dict.fromkeys((t.how, t.cuda_graph) for t in chosen):
        cells = []
        for m in columns:
            found = [t for t in chosen if (t.how, t.cuda_graph, t.rows) == (how, graph, m)]
            cells.append(f"{found[0].median_us:.0f} ({found[0].min_us:.0f}–{found[0].max_us:.0f})" if found else "–")
        lines.append(f"| {how} | {'yes' if graph else 'no'} | " + " | ".join(cells) + " |")
    return lines


def markdown(report: Report) -> str:
    """The report as text."""
    lines = ["# fp8 operators under ONNX Runtime CUDA", "", *[f"- {k}: {v}" for k, v in report.environment.items()]]
    for case, title in (("chain", "Eight chained matmuls"), ("block", "DiT block without attention")):
        if any(t.case == case for t in report.timings):
            lines += ["", f"## {title}, µs a run: median (min–max)", "", *table(report.timings, case)]
    lines += [
        "",
        "## Accuracy, relative L2",
        "",
        "| model | form | operator | rows | same operands | limit | unquantised | passes |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in report.accuracy:
        same, limit = (f"{row[k]:.2e}" if row[k] is not None else "–" for k in ("rel_same_operands", "limit"))
        lines.append(f"| {row['model']} | {row['form']} | {row['name']} | {row['rows']} | {same} | {limit} | "
                     f"{row['rel_unquantised']:.2e} | {row['passes']} |")  # fmt: skip
    lines += ["", "## What cublasLt chose", "", "```", *report.plans, "```", "", "## Errors", ""]
    lines += [f"- {e['part']}: {e['error'].splitlines()[0][:300]}" for e in report.errors] or ["none"]
    return "\n".join(lines) + "\n"


def write(report: Report, stem: Path, log: Path) -> None:
    """Write STEM.json and STEM.md; called after every part, so that a killed run leaves what it had."""
    report.plans = sorted(
        {line for line in log.read_text(errors="replace").splitlines() if line.startswith("qexport fp8")}
    )
    data = asdict(report)
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1))
    stem.with_suffix(".md").write_text(markdown(report))
