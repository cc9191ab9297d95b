"""Lower a bundle to a target: rewritten graphs beside the portable ones, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qexport.bundle import Bundle, BundleWriter, Manifest, WeightFileWriter
from qexport.bundle.files import MANIFEST, REPORTS, WEIGHTS, walk
from qexport.errors import BundleError, InputError, UnsupportedError
from qexport.hidden import meant_by
from qexport.lower.choose import Choice, choose
from qexport.lower.decoder_range import DecoderRange, decoder_of, measure_range
from qexport.lower.graphs import RewriteCount, check_graph, read_graph, rewrite, write_graph
from qexport.lower.passes.dense_weights import DenseWeights
from qexport.lower.passes.fused_attention import FusedAttention
from qexport.lower.passes.half import HalfPrecision, StatePorts
from qexport.lower.passes.unrounded_inputs import UnroundedInputs
from qexport.lower.rewrite import Rewrite
from qexport.lower.targets import Target, find_target
from qexport.lower.work import plan_work
from qexport.targets import FUSED_FORMS
from qexport.targets.device_table import find_table
from qexport.targets.devices import device_names

FOLDER = "targets"

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


@dataclass(frozen=True)
class LowerReport:
    """What lowering did.

    `graphs` has the rewrites of each graph by name; graphs without any are used as they are and have no file.
    `added_bytes` is what the target's folder takes, of which `weights_bytes` are tensors that changed. `aim` says what
    forms of layers were chosen for, and by which table; `choices` has every layer's, both empty without one.
    `decoder_range` has the greatest number that a decoder in float16 met (`qexport.lower.decoder_range`); None where it
    computes in float32, or where the measuring was left out.
    """

    target: str
    dtype: str
    provider: str
    bundle: str
    added_bytes: int
    weights_bytes: int
    files: tuple[str, ...]
    graphs: Mapping[str, Mapping[str, RewriteCount]] = field(default_factory=dict)
    aim: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()
    decoder_dtype: str = "float32"
    decoder_range: DecoderRange | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        choices = [choice.to_json() for choice in self.choices]
        return {**asdict(replace(self, choices=())), "files": list(self.files), "choices": choices}


def lower(
    path: str | Path,
    target: str,
    *,
    dtype: str | None = None,
    optimize: str | None = None,
    batch: int = 1,
    table: Path | None = None,
    progress: Progress | None = None,
    decoder_dtype: str = "float32",
    measure_decoder: bool = True,
) -> LowerReport:
    """Add the graphs of a target to a bundle; one that is there already is replaced.

    Tensors whose bytes are what they were stay in the bundle's weight file; changed ones go to the target's own. The
    portable graphs, and other targets, are not touched. The bundle is replaced as a whole by a rename, its large files
    being linked and not copied where the file system can; the report also lies in ``reports/lower-TARGET.json``.

    Args:
        path: the bundle.
        target: a name of `qexport.lower.TARGETS`.
        dtype: what the graphs compute in; None takes the target's default.
        optimize: choose the form of every quantised layer by a measured table, for ``"latency"``, ``"memory"`` or
            ``"balanced"`` (`qexport.lower.choose`); None leaves all as they are stored.
        batch: images at a time that forms are chosen for.
        table: the table; None takes this device's, or else the one that comes with qexport.
        progress: told how far it is.
        decoder_dtype: what the autoencoder at the end of the plan computes in. In float16 the bundle first draws a few
            latents on the CPU, and the range of every number of the decoder is measured on them.
        measure_decoder: False leaves that out; for bundles of random weights, whose ranges mean nothing.

    Raises:
        BundleError: the bundle is damaged.
        UnsupportedError: no such target or type, or the bundle must be quantised in another way for it, or its decoder
            does not fit into float16.
        InputError: the bundle cannot be written, or there is no table of the target's forms.
    """
    chosen = find_target(target)
    compute = dtype or chosen.dtypes[0]
    if compute not in chosen.dtypes:
        raise UnsupportedError(f"{target} computes in {' or '.join(chosen.dtypes)}, not in {compute}")
    if decoder_dtype not in chosen.dtypes:
        raise UnsupportedError(f"decoders of {target} compute in {' or '.join(chosen.dtypes)}, not in {decoder_dtype}")
    bundle = Bundle.open(path)
    shared = bundle.path / WEIGHTS
    if shared.stat().st_nlink > 1:
        raise BundleError(f"{shared}: has several names (hard links), which onnx refuses; copy the bundle with `cp -r`")
    reason = chosen.obstacle(bundle.manifest)
    if reason:
        raise UnsupportedError(f"{path}: {reason}; quantise for {target}, it cannot be lowered to")
    tell = progress or (lambda stage, done, total: None)
    aim, choices = ({}, ()) if optimize is None else _choose(bundle, chosen, compute, optimize, batch, table)
    half_decoder = decoder_of(bundle) if decoder_dtype == "float16" else None
    found = None
    if half_decoder is not None and measure_decoder:
        tell("decoder's range", 0, 1)
        found = measure_range(bundle, half_decoder, [step() for step in chosen.rewrites])
        tell("decoder's range", 1, 1)
    with BundleWriter(bundle.path, overwrite=True) as writer:
        return _write(bundle, chosen, compute, aim, choices, writer, tell, half_decoder, found)


def _choose(
    bundle: Bundle, target: Target, dtype: str, mode: str, batch: int, file: Path | None
) -> tuple[dict[str, Any], tuple[Choice, ...]]:
    """What is aimed for, and each layer's choice."""
    if batch < 1:
        raise InputError(f"batch is {batch}; at least 1 is needed")
    if target.provider not in FUSED_FORMS:
        raise UnsupportedError(f"{target.name} chooses the forms of layers by itself; leave --optimize out")
    table = find_table(target.provider, device_names(target.provider), file)
    aim = {"optimize": mode, "batch": batch, "device": table.device, "source": table.source}
    return aim, choose(bundle, plan_work(bundle, batch), table, mode, dtype)


def _steps(target: Target, dtype: str, dense: set[str], ports: list[StatePorts], convolutional: bool) -> list[Rewrite]:
    """The rewrites of one graph; what is dequantised at load comes last, so that all others see codes and scales."""
    steps = [step(dense) if step is FusedAttention else step() for step in target.rewrites]
    if dtype == "float16" or convolutional:
        steps.append(HalfPrecision(ports, convolutional))
    return [*steps, DenseWeights(dense)] if dense else steps


def _write(
    bundle: Bundle,
    target: Target,
    dtype: str,
    aim: Mapping[str, Any],
    choices: tuple[Choice, ...],
    writer: BundleWriter,
    tell: Progress,
    half_decoder: str | None,
    decoder_range: DecoderRange | None,
) -> LowerReport:
    folder = f"{FOLDER}/{target.name}"
    (writer.path / folder).mkdir(parents=True)
    location = f"{folder}/{WEIGHTS}"
    counts: dict[str, dict[str, RewriteCount]] = {}
    graphs: dict[str, str] = {}
    with WeightFileWriter(writer.path / location) as weights:
        for done, (name, file) in enumerate(bundle.graph_files().items()):
            tell("lower", done, len(bundle.plan.graphs))
            model = read_graph(file)
            dense = {choice.weight for choice in choices if choice.dense and choice.graph == name}
            steps = _steps(target, dtype, dense, state_ports(bundle.manifest, name), name == half_decoder)
            unrounded = {choice.weight for choice in choices if choice.unrounded and choice.graph == name}
            if unrounded:  # first: what is left is a layer like any other
                steps.insert(0, UnroundedInputs(unrounded))
            counts[name] = rewrite(model, steps)
            if any(count.rewritten for count in counts[name].values()):
                graphs[name] = f"{folder}/{name}.onnx"
                halved = counts[name].get(HalfPrecision.name)
                computes = "float16" if halved is not None and halved.rewritten else "float32"
                write_graph(model, writer.path, graphs[name], weights, location, computes)
    for relative in graphs.values():
        check_graph(writer.path / relative)
    # Only now: onnx refuses to read files that have several names.
    for name, _ in walk(bundle.path):
        if name != MANIFEST and not name.startswith(f"{folder}/"):
            _link(bundle.path / name, writer.path / name)
    weights_bytes = (writer.path / location).stat().st_size
    if not weights_bytes:
        (writer.path / location).unlink()
    files = tuple(sorted(p.relative_to(writer.path).as_posix() for p in (writer.path / folder).iterdir()))
    added = sum((writer.path / name).stat().st_size for name in files)
    report = LowerReport(
        target.name, dtype, target.provider, str(bundle.path), added, weights_bytes, files, counts, aim, choices,
        "float16" if half_decoder else "float32", decoder_range,
    )  # fmt: skip
    data = json.dumps(report.to_json(), indent=1) + "\n"
    writer.write(f"{REPORTS}/lower-{target.name}.json", data.encode())
    tell("write", 0, 1)
    writer.finish(replace(bundle.manifest, targets={**bundle.manifest.targets, target.name: graphs}))
    tell("write", 1, 1)
    return report


def state_ports(manifest: Manifest, graph: str) -> list[StatePorts]:
    """The ports of `graph` for each state that starts as zeros and that no other graph reads or writes."""
    found = []
    for state in manifest.plan.state:
        if state.dtype != "float32" or state.init != "zeros" or state.name == manifest.plan.output:
            continue
        source = f"state.{state.name}"
        calls = [
            call
            for call in manifest.plan.calls
            if source in call.inputs.values() or state.name in call.outputs.values()
        ]
        if {call.graph for call in calls} == {graph}:
            inputs = {port: None for call in calls for port, given in call.inputs.items() if given == source}
            outputs = {port: None for call in calls for port, name in call.outputs.items() if name == state.name}
            found.append(StatePorts(tuple(inputs), tuple(outputs)))
    return found


def _link(source: Path, destination: Path) -> None:
    """A second name for the same bytes, or a copy where the file system knows no links."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except OSError as error:
        try:
            shutil.copyfile(source, destination)
        except OSError:
            raise InputError(f"{meant_by(str(destination))}: cannot be written ({error.strerror})") from error
