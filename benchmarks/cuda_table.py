"""The CUDA table: this project's own bundles, lowered to ort-cuda, against torch, on the device at hand.

    python benchmarks/cuda_table.py --make SKELETONS                on any machine: one small file a bundle
    python benchmarks/cuda_table.py --from SKELETONS --out STEM     on a machine with a GPU: minutes, not hours
    python benchmarks/cuda_table.py --out STEM                      the same without skeletons: makes the bundles there
    python benchmarks/cuda_table.py --rehearse                      on any: small, on the CPU, no claim

DiT-XL/2: one forward of the denoising graph for 1, 8 and 32 images (the batch inside is twice that: 2, 16, 64). VAR:
whole images, batch 1, 8 and 32. Forms: fp16, W8A16, W4A16, W8A8 in int8 and fp8, two also with `--optimize latency`
for the largest batch, each lowered with float16 compute, each also under CUDA graphs (everything bound; VAR: every
scale a graph of its own on fixed buffers); for whole images fp16 and W4A16 also with a float16 decoder; torch eager
and torch.compile (reduce-overhead) in the same run. Weights are random numbers of the published shapes; speed does not
depend on them (`benchmarks/skeleton.py`).

Every form has processes of its own, the most important forms first, for all models. A row holds median, least and
greatest of its runs and the memory that the device lost to it once loaded, and after this batch (with all before it;
`benchmarks/cuda_parts.py` says what is not counted). The second table is about whole bundles: bytes on disk, memory
with all sessions made and after one image, as ONNX Runtime does it by default and frugally, each also relative to
fp16, and how many heavy nodes fell back to the CPU (must be none). Both are written after every row. What was not
measured says why.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cuda_parts as parts
import numpy as np
from cuda_parts import Form, Runs, Subject
from cuda_torch import torch_part
from parts import in_a_process
from skeleton import FACTS, pack, unpack

UNMEASURED = "not measured on CUDA"
NOT_NOW = "not measured:"
"""What begins so is tried again by `--resume`."""
OUT_OF_TIME = f"{NOT_NOW} out of time"
MAKING_SECONDS = 3600.0

FORMS: dict[str, Form] = {
    "fp16": Form("fp16", 16),
    "w8a16": Form("W8A16", 8),
    "w4a16": Form("W4A16", 4),
    "w4a16-latency": Form("W4A16, --optimize latency", 4, optimised=True),
    "w8a8-int8": Form("W8A8-int8", 8, 8),
    "w8a8-int8-latency": Form("W8A8-int8, --optimize latency", 8, 8, optimised=True),
    "w8a8-fp8": Form("W8A8-fp8", 8, 8, "fp8"),
    "fp16-decoder": Form("fp16, float16 decoder", 16, decoder="float16"),
    "w4a16-decoder": Form("W4A16, float16 decoder", 4, decoder="float16"),
}
TORCH = {"torch-eager": "torch eager fp16", "torch-compile": "torch.compile fp16"}

ORDER = (
    "fp16", "torch-eager", "w4a16", "fp16-decoder", "w4a16-decoder", "w8a16", "torch-compile", "w4a16-latency",
    "w8a8-fp8", "w8a8-int8", "w8a8-int8-latency",
)  # fmt: skip
"""What is measured first, in case time runs out."""

MEMORY_OPTIONS = {
    "default": {},
    "frugal": {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_use_max_workspace": "0"},
}
"""Options of the CUDA provider under which the memory of whole bundles is taken."""

FRUGAL_FORMS = ("fp16", "W4A16")

SUBJECTS = (
    Subject("dit-xl-2-256", "denoise", (1, 8, 32)),
    Subject("var-d16", None, (1, 8, 32)),
    Subject("var-d30", None, (1, 8, 32)),
)
REHEARSAL = (
    Subject("dit-c10-d2", "denoise", (1, 2), random=False),
    Subject("var-c10-d2", None, (1, 2), random=False),
)


def archive(folder: Path, subject: Subject, form: str) -> Path:
    """Where a skeleton lies."""
    return folder / f"{subject.name}-{form}.tar.xz"


def applies(subject: Subject, form: str) -> bool:
    """Whether a form says anything of a model: what a decoder computes in, only of whole images."""
    return form not in FORMS or FORMS[form].decoder == "float32" or subject.forward is None


def make(folder: Path, bundles: Path, subjects: Sequence[Subject], forms: Sequence[str]) -> list[dict[str, Any]]:
    """A skeleton for every model and form that has none in `folder`; bundles are deleted once they are packed."""
    answers = []
    for form in (form for form in forms if form in FORMS):
        for subject in (subject for subject in subjects if applies(subject, form)):
            out, bundle = archive(folder, subject, form), bundles / f"{subject.name}-{form}"
            if not out.exists():
                arguments = (subject, FORMS[form], str(bundle))
                failed = in_a_process(parts.make_part, arguments, MAKING_SECONDS, lambda batch, found: None)
                if failed is None:
                    pack([bundle], out)
                    shutil.rmtree(bundle)
                else:
                    answers.append({"model": subject.name, "form": FORMS[form].name, "failed": failed})
                    continue
            answers.append({"skeleton": out.name, "bytes": out.stat().st_size})
            print(json.dumps(answers[-1]), flush=True)
    return answers


@dataclass
class Table:
    """The measuring: where bundles come from, until when, and what has been found."""

    provider: str
    runs: Runs
    folder: Path
    skeletons: Path | None
    deadline: float
    timeout: float
    out: Path | None
    captured_only: bool = False
    report: dict[str, Any] = field(default_factory=lambda: {"rows": [], "bundles": []})

    def measure(self, subject: Subject, form: str) -> None:
        """Every row of one model in one form."""
        name = FORMS[form].name if form in FORMS else TORCH[form]
        if form in TORCH:
            compiled = form == "torch-compile"
            self._time(subject, name, torch_part, lambda left: (left, self.provider, compiled, self.runs))
            return
        labels = {f"{name}, CUDA graph" if self.provider == "cuda" else f"{name}, fixed buffers": True, name: False}
        if self.provider == "cpu" and subject.forward is not None:
            labels = {name: False}  # CUDA graphs need a GPU, and buffers are fixed anyway
        elif self.captured_only:
            del labels[name]
        if not any(self._missing(subject, label) for label in labels) and self._described(subject, name):
            return
        try:
            if self._left() <= 0:
                raise Unavailable(OUT_OF_TIME)
            with self._bundle(subject, form) as bundle:
                part = parts.image_part if subject.forward is None else parts.forward_part
                for label, captured in labels.items():
                    self._time(
                        subject, label, part,
                        lambda left, captured=captured: (bundle, left, self.provider, captured, self.runs),
                    )  # fmt: skip
                if not self._described(subject, name):
                    self._describe(subject, name, bundle)
        except Unavailable as error:
            for label in labels:
                self._failed(subject, label, str(error))

    def _describe(self, subject: Subject, name: str, bundle: Path) -> None:
        """The row of a whole bundle."""
        facts = bundle / FACTS
        row: dict[str, Any] = {"model": subject.name, "form": name}
        row |= json.loads(facts.read_text()) if facts.exists() else {"size_bytes": _bundle_bytes(bundle)}
        self.report["bundles"].append(row)

        for kind, options in MEMORY_OPTIONS.items():
            if kind != "default" and name not in FRUGAL_FORMS:
                continue

            def heard(batch: int, found: dict[str, Any], kind: str = kind) -> None:
                row.update({f"{kind}_{key}" if "bytes" in key else key: value for key, value in found.items()})

            given = options if self.provider == "cuda" else {}
            failed = self._run(parts.bundle_part, (bundle, self.provider, given, kind == "default"), heard)
            row.update({f"{kind}_failed": failed} if failed else {})
            self.write()
        print(json.dumps(row), flush=True)

    def _time(self, subject: Subject, label: str, part: Any, arguments: Callable[[Subject], tuple[Any, ...]]) -> None:
        """The rows of one part that are missing, each written as soon as it is there."""
        missing = self._missing(subject, label)
        if not missing:
            return

        def heard(batch: int, found: dict[str, Any]) -> None:
            self._add({"model": subject.name, "form": label, "batch": batch, **found})

        failed = self._run(part, arguments(replace(subject, batches=missing)), heard)
        if failed:
            self._failed(subject, label, failed)

    def _run(self, part: Any, arguments: tuple[Any, ...], heard: Any) -> str | None:
        seconds = min(self.timeout, self._left())
        if seconds <= 0:
            return OUT_OF_TIME
        failed = in_a_process(part, arguments, seconds, heard)
        cut = failed is not None and seconds < self.timeout and self._left() <= 0
        return OUT_OF_TIME if cut else failed

    def _failed(self, subject: Subject, label: str, reason: str) -> None:
        """A row that says why for each batch that has none."""
        for batch in self._missing(subject, label):
            self._add({"model": subject.name, "form": label, "batch": batch, "failed": reason})

    def _missing(self, subject: Subject, label: str) -> tuple[int, ...]:
        rows = [row for row in self.report["rows"] if (row["model"], row["form"]) == (subject.name, label)]
        return tuple(batch for batch in subject.batches if batch not in {row["batch"] for row in rows})

    def _described(self, subject: Subject, name: str) -> bool:
        return any((row["model"], row["form"]) == (subject.name, name) for row in self.report["bundles"])

    @contextmanager
    def _bundle(self, subject: Subject, form: str) -> Iterator[Path]:
        """A bundle's folder, deleted afterwards if it came from a skeleton."""
        bundle = self.folder / f"{subject.name}-{form}"
        if self.skeletons is None:
            failed = self._made(subject, form, bundle)
            if failed:
                raise Unavailable(failed)
            yield bundle
            return
        packed = archive(self.skeletons, subject, form)
        if not packed.exists():
            raise Unavailable(f"{NOT_NOW} no skeleton {packed.name}")
        try:
            try:
                unpack(packed, self.folder)
            except (OSError, tarfile.TarError, lzma.LZMAError) as error:
                raise Unavailable(f"{NOT_NOW} {packed.name}: {type(error).__name__}: {error}") from error
            yield bundle
        finally:
            shutil.rmtree(bundle, ignore_errors=True)

    def _made(self, subject: Subject, form: str, bundle: Path) -> str | None:
        arguments = (subject, FORMS[form], str(bundle))
        return in_a_process(parts.make_part, arguments, min(MAKING_SECONDS, self._left()), lambda batch, found: None)

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _add(self, row: dict[str, Any]) -> None:
        self.report["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Both files, where there is a place for them."""
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.with_suffix(".json").write_text(json.dumps(self.report, indent=1) + "\n")
            self.out.with_suffix(".md").write_text(markdown(self.report))


class Unavailable(Exception):  # noqa: N818 - it is no error
    """There is no bundle to measure; says why."""


def _bundle_bytes(bundle: Path) -> int:
    from qexport.bundle import Bundle

    return Bundle.open(bundle, "size").size_bytes


COLUMNS = (
    "model", "form", "batch", "ms", "ms_min", "ms_max", "runs", "device_bytes_loaded", "device_bytes_after",
    "uncaptured", "failed",
)  # fmt: skip
BUNDLE_COLUMNS = (
    "model", "form", "size_bytes", "default_device_bytes_loaded", "default_device_bytes_after",
    "frugal_device_bytes_loaded", "frugal_device_bytes_after", "fallback", "default_failed", "frugal_failed",
)  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The report as two tables."""
    lines = [f"# {report.get('device', '')}", "", *_rows(COLUMNS, report["rows"])]
    lines += [
        "",
        "## Whole bundles",
        "",
        *_rows(BUNDLE_COLUMNS, [_beside_fp16(row, report) for row in report["bundles"]]),
    ]
    return "\n".join(lines) + "\n"


def _beside_fp16(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Bytes with what they are relative to the fp16 bundle of the same model."""
    base = next((r for r in report["bundles"] if (r["model"], r["form"]) == (row["model"], "fp16")), {})
    return {
        key: f"{value} ({value / base[key]:.3f})" if "_bytes" in key and value and base.get(key) else value
        for key, value in row.items()
    }


def _rows(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ["–" if row.get(column) is None else str(row[column]) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def device_name(provider: str) -> str:
    if provider != "cuda":
        return f"rehearsal on the CPU: {UNMEASURED}"
    import torch

    return torch.cuda.get_device_name()


def environment(provider: str) -> dict[str, Any]:
    """Versions, and name and driver of the GPU as nvidia-smi has them; needs nothing but what is measured."""
    import onnxruntime
    import torch

    found = {
        "onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "cuda_of_torch": torch.version.cuda,
        "numpy": np.__version__, "python": platform.python_version(), "platform": platform.platform(),
        "cpu_count": os.cpu_count(), "provider": provider,
    }  # fmt: skip
    if provider == "cuda":
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            found["gpu"] = answer.stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found["gpu"] = f"nvidia-smi: {type(error).__name__}"
    return found


def chosen_subjects(args: argparse.Namespace) -> tuple[Subject, ...]:
    """The models asked for, with the batches asked for."""
    subjects = REHEARSAL if args.rehearse else SUBJECTS
    if args.models:
        subjects = tuple(subject for subject in subjects if subject.name in args.models.split(","))
    if args.batches:
        batches = tuple(int(batch) for batch in args.batches.split(","))
        subjects = tuple(replace(subject, batches=batches) for subject in subjects)
    return subjects


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", help="comma-separated; all by default")
    parser.add_argument("--forms", help=f"comma-separated, of {', '.join(ORDER)}; all by default, in this order")
    parser.add_argument("--batches", help="comma-separated; 1,8,32 by default")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10, help="no batch is repeated for longer, beyond 5 runs")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="after that nothing new is measured")
    parser.add_argument("--timeout", type=float, default=240, help="seconds of one part, after which it is killed")
    parser.add_argument("--no-torch", action="store_true", help="leave torch eager and torch.compile out")
    parser.add_argument("--captured-only", action="store_true", help="leave runs without CUDA graphs out")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU; proves that the command runs")
    parser.add_argument("--make", type=Path, metavar="SKELETONS", help="only make the bundles, and pack them there")
    parser.add_argument(
        "--from", type=Path, metavar="SKELETONS", dest="skeletons", help="measure what was packed there"
    )
    parser.add_argument("--folder", type=Path, help="where bundles are made or unpacked; a temporary one by default")
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    parser.add_argument("--resume", action="store_true", help="go on from --out: what is there is not measured again")
    args = parser.parse_args(argv)
    subjects = chosen_subjects(args)
    wanted = set(args.forms.split(",")) if args.forms else set(ORDER) - (set(TORCH) if args.no_torch else set())
    if not wanted <= set(ORDER):
        parser.error(f"--forms: {', '.join(sorted(wanted - set(ORDER)))} is none of {', '.join(ORDER)}")
    forms = [form for form in ORDER if form in wanted]
    with tempfile.TemporaryDirectory(prefix="qexport-cuda-table-") as temporary:
        folder = args.folder or Path(temporary)
        if args.make:
            print(json.dumps(make(args.make, folder, subjects, forms), indent=1))
            return
        table = start(args, folder)
        for form in forms:
            for subject in subjects:
                if applies(subject, form):
                    table.measure(subject, form)
    table.write()
    print(markdown(table.report))


def start(args: argparse.Namespace, folder: Path) -> Table:
    """An empty table, or what `--resume` goes on from: all rows but those that say `NOT_NOW`."""
    from qexport.runtime.session import choose_provider

    provider = "cpu" if args.rehearse else choose_provider("cuda")  # says what is missing, and stops
    runs = Runs(1, 2) if args.rehearse else Runs(args.warmup, args.runs, args.seconds)
    deadline = time.monotonic() + 60 * args.minutes
    table = Table(provider, runs, folder, args.skeletons, deadline, args.timeout, args.out, args.captured_only)
    earlier = args.out.with_suffix(".json") if args.out else None
    if args.resume and earlier and earlier.exists():
        found = json.loads(earlier.read_text())
        table.report["rows"] = [row for row in found["rows"] if NOT_NOW not in row.get("failed", "")]
        table.report["bundles"] = [row for row in found["bundles"] if OUT_OF_TIME not in row.values()]
    facts = {
        "command": "python benchmarks/cuda_table.py",
        "device": device_name(provider),
        "environment": environment(provider),
    }
    table.report = {**facts, **table.report}
    return table


if __name__ == "__main__":
    main()
