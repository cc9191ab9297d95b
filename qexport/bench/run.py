"""`bench`: bundles against their floating-point twins and torch, in one run, interleaved."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from qexport.bench.ceilings import measure_ceilings
from qexport.bench.contender import COMPILED, FP16, FP32, REFERENCES, TORCH, Contender, Settings
from qexport.bench.process import Racer, stop_all
from qexport.bench.report import Batch, BenchReport, Row
from qexport.bench.roofline import roofline, weight_bytes
from qexport.bench.timing import RUNS, WARM_UP, Turns, race
from qexport.bundle import Bundle
from qexport.bundle.files import WEIGHTS
from qexport.errors import InputError
from qexport.hidden import meant_by, replacing
from qexport.lower.work import GraphWork, plan_work
from qexport.runtime.clock import TOTAL
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import choose_provider
from qexport.targets import QuantTraits, session_config
from qexport.targets.ort_cuda import captured

REPORT = "bench.json"
BATCHES = (1, 8)
PORTABLE = "portable"
"""The name that `targets` takes for the graphs as they were written."""

TARGET_PROVIDERS = {"cpu": ("ort-cpu",), "cuda": ("ort-cuda",), "tensorrt": ("tensorrt",)}
"""Lowered graphs that take part where no target is named: those made for the provider."""

Progress = Callable[[str, int, int], None]


def bench(
    paths: Sequence[str | Path],
    *,
    batches: Sequence[int] = BATCHES,
    provider: str = "auto",
    targets: Sequence[str] | None = None,
    threads: int | None = None,
    runs: int = RUNS,
    warm_up: int = WARM_UP,
    against: Sequence[str] = REFERENCES,
    schedule: str | None = None,
    calls: int | None = None,
    checkpoint: str | None = None,
    vae_checkpoint: str | None = None,
    reports: bool = True,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure speed and memory; `BenchReport.words` says where a quantised graph is slower than floating point.

    Every contender has a process of its own and they take turns. The first bundle's model is that of the references.

    Args:
        paths: bundles of one model.
        batches: batch sizes.
        provider: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        targets: lowered graphs that take part, ``"portable"`` for the graphs as they are; None takes the portable ones
            and those lowered for the provider, where there are any.
        threads: CPU threads of each; None leaves it to the runtimes.
        runs: turns that count, for each batch size.
        warm_up: turns before them that do not.
        against: of `REFERENCES`: ``"fp32"`` and ``"fp16"``, the first bundle's floating-point twins; ``"eager"`` and
            ``"compile"``, the model in torch, left out where its weights are not at hand.
        schedule: of a denoiser; None takes the plan's.
        calls: play only the plan's first calls of graphs; None plays whole images.
        checkpoint: file of the generator's weights, for torch.
        vae_checkpoint: file of the decoder's weights, for torch.
        reports: write ``reports/bench.json`` into each bundle.
        progress: told how far it is.

    Raises:
        InputError: there is no such bundle, target or reference; the bundles are of different models; a number is
            not positive.
        BundleError: a bundle is damaged.
    """
    tell = progress or (lambda stage, done, total: None)
    chosen = choose_provider(provider)
    bundles = _open(paths)
    _check(batches, runs, warm_up, threads, calls, against)
    settings = Settings(chosen, threads, schedule, calls)
    works = {size: plan_work(bundles[0], size, schedule, calls) for size in sorted(set(batches))}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qexport-bench-")))
        contenders = [one for bundle in bundles for one in _of_bundle(bundle, chosen, targets, len(bundles) > 1)]
        tell("prepare", 0, 1)
        contenders += _references(bundles[0], folder, chosen, against, checkpoint, vae_checkpoint)
        before = measure_ceilings(chosen, threads)
        racers: list[Racer] = []
        stack.callback(stop_all, racers)  # before the folder goes
        for done, contender in enumerate(contenders):
            tell("load", done, len(contenders))
            racers.append(Racer(contender, settings))
        turns = {}
        for size in sorted(set(batches)):
            tell(f"batch {size}", 0, warm_up + runs)
            turns[size] = race(
                racers, size, warm_up, runs, lambda done, total, size=size: tell(f"batch {size}", done, total)
            )
        ceilings = before.best(measure_ceilings(chosen, threads))  # another process may have been in the way of one
        read = {racer.contender.name: _weights_read(racer.contender) for racer in racers}
        report = BenchReport(
            rows=[],
            settings={**asdict(settings), "warm_up": warm_up, "runs": runs, "options": "serve",
                      "played": "whole images" if calls is None else f"the first {calls} calls of graphs"},
            environment=_environment(chosen),
            ceilings=ceilings,
        )  # fmt: skip
        for racer in racers:
            name = racer.contender.name
            found = {}
            for size in turns:
                if name in turns[size].seconds:
                    batch = _batch(name, turns[size], racers, calls)
                    found[size] = _with_rooflines(batch, works[size], read[name], report)
            if racer.failed and racer.contender.optional:
                report.left_out[name] = racer.failed
            report.rows.append(Row(racer.contender, racer.load_s, racer.held, found, racer.failed))
    if reports:
        for bundle in bundles:
            _write(bundle, report)
    return report


def _open(paths: Sequence[str | Path]) -> list[Bundle]:
    if not paths:
        raise InputError("no bundle; name at least one")
    bundles = [Bundle.open(path) for path in paths]
    models = {bundle.manifest.model.name for bundle in bundles}
    if len(models) > 1:
        raise InputError(f"bundles of different models ({', '.join(sorted(models))}); bench one model at a time")
    return bundles


def _check(
    batches: Sequence[int], runs: int, warm_up: int, threads: int | None, calls: int | None, against: Sequence[str]
) -> None:
    numbers = {"batch": min(batches, default=0), "runs": runs, "threads": threads or 1, "calls": calls or 1}
    if calls == 0 or threads == 0:
        raise InputError("0 calls or threads; at least 1 is needed")
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; at least 1 is needed")
    if warm_up < 0:
        raise InputError(f"{warm_up} warm-up runs; 0 or more")
    for name in against:
        if name not in REFERENCES:
            raise InputError(f"unknown reference {name!r}; any of {', '.join(REFERENCES)}")


def _of_bundle(bundle: Bundle, provider: str, targets: Sequence[str] | None, several: bool) -> list[Contender]:
    if targets is None:
        made = [name for name in TARGET_PROVIDERS[provider] if name in bundle.manifest.targets]
        targets = [PORTABLE, *made]
    found = []
    for target in targets:
        files = bundle.graph_files(None if target == PORTABLE else target)
        configs = {graph: session_config(provider, "serve", quant_traits(bundle.manifest, graph)) for graph in files}
        short = bundle.path.name if several else bundle.manifest.scheme
        name = short if target == PORTABLE else f"{short}, {target}"
        own = bundle.size_bytes - sum(
            entry.size for file, entry in bundle.manifest.files.items() if file.startswith("targets/")
        )
        added = sum(
            entry.size for file, entry in bundle.manifest.files.items() if file.startswith(f"targets/{target}/")
        )
        one = Contender(name, bundle.path, bundle.path, files, configs, own + added)
        found.append(one)
        if target == "ort-cuda" and provider == "cuda":
            graphs = {graph: captured(config) for graph, config in configs.items()}
            found.append(replace(one, name=f"{name}, CUDA graph", configs=graphs, captured=True))
    return found


def _references(
    bundle: Bundle, folder: Path, provider: str, against: Sequence[str], checkpoint: str | None, vae: str | None
) -> list[Contender]:
    found = []
    for form in (FP32, FP16):
        if form not in against:
            continue
        from qexport.bench.reference import write_twin

        root = folder / form
        root.mkdir()
        files = write_twin(bundle, root, form, provider)
        plain = session_config(provider, "serve", QuantTraits())
        configs = dict.fromkeys(files, plain)
        size = (root / WEIGHTS).stat().st_size + sum(file.stat().st_size for file in files.values())
        found.append(Contender(form, bundle.path, root, files, configs, size, reference=True))
    for key, name in TORCH.items():
        if key in against:
            one = Contender(name, bundle.path, bundle.path, compiled=name == COMPILED, reference=True)
            found.append(replace(one, checkpoint=checkpoint, vae_checkpoint=vae))
    return found


def _batch(name: str, turns: Turns, racers: Sequence[Racer], calls: int | None) -> Batch:
    graphs = turns.seconds[name][0]
    spreads = {graph: turns.spread(name, graph) for graph in graphs}
    references = [racer.contender.name for racer in racers if racer.contender.reference]
    ratios = {base: turns.ratio(base, name, TOTAL) for base in references if base in turns.seconds and base != name}
    images_per_s = turns.batch / spreads[TOTAL].median * 1e3 if calls is None else None
    return Batch(spreads, images_per_s, ratios)


def _with_rooflines(
    batch: Batch, work: Mapping[str, GraphWork], read: Mapping[str, float], report: BenchReport
) -> Batch:
    if report.ceilings is None or not read:
        return batch
    lines = {
        graph: roofline(work[graph], read[graph], batch.spreads[graph].median, report.ceilings)
        for graph in read
        if graph in batch.spreads
    }
    return Batch(batch.spreads, batch.images_per_s, batch.ratios, lines)


def _weights_read(contender: Contender) -> dict[str, float]:
    return {graph: weight_bytes(file) for graph, file in contender.files.items()}


def _environment(provider: str) -> dict[str, object]:
    from qexport.verify.environment import describe_environment

    return describe_environment(provider)


def _write(bundle: Bundle, report: BenchReport) -> None:
    """Whole or not at all; where it cannot be written, the report says so."""
    try:
        bundle.reports.mkdir(exist_ok=True)
        with replacing(bundle.reports / REPORT) as partial:
            partial.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        where = meant_by(str(error.filename or bundle.reports / REPORT))
        report.left_out["report file"] = f"{where}: {error.strerror}"
