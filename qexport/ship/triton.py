"""A bundle as a model repository of the Triton Inference Server.

```
REPOSITORY/NAME/           plays the plan: Python backend, calls the others (business logic scripting)
REPOSITORY/NAME_<graph>/   one for each graph: ONNX Runtime backend
REPOSITORY/README.md
```

Every model folder needs the weights at its side, since external data is looked for there: one copy with hard links to
it where the file system allows them, copies elsewhere. The bundle's own file gets no second name: onnx (1.23) refuses
external data that has one, and then the bundle could be served but no longer lowered.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qexport.bundle import Bundle
from qexport.bundle.files import WEIGHTS, explain_os_error
from qexport.errors import InputError
from qexport.plan import Plan
from qexport.runtime import CallRecord, Player
from qexport.runtime.inputs import label_input
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import make_session
from qexport.ship.atomic import new_folder
from qexport.ship.pbtxt import dumps
from qexport.ship.triton_config import (
    MAX_WARM_UP_BYTES,
    WARM_UP_BATCH,
    PortInfo,
    graph_config,
    player_config,
)
from qexport.targets import session_config

PLAYER = "triton_player.py"
OWN_INPUTS = ("seed", "index")
WARM_UP_ITERATIONS = 2
"""Calls of each graph that are played for real inputs to warm up with: in the second no state is empty any more."""


@dataclass(frozen=True)
class Repository:
    """What was written: the names of the models, and the bytes of all files, those of several names once."""

    path: Path
    models: tuple[str, ...]
    size_bytes: int


def write_repository(
    bundle: Bundle,
    out: str | Path,
    *,
    name: str | None = None,
    schedule: str | None = None,
    max_batch: int = 8,
) -> Repository:
    """Write a model repository into the new folder `out`; all or nothing.

    Args:
        bundle: what to ship.
        out: must not exist, or be an empty folder.
        name: of the model; the bundle's folder's if left out.
        schedule: of a diffusion model, in place of the default; Triton's players know one.
        max_batch: most images in a batch.

    Raises:
        InputError: `out` is taken or cannot be written, or the plan cannot be served this way.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists; a model repository is written into a new folder")
    plan = bundle.plan if schedule is None else bundle.plan.with_schedule(schedule)
    if clash := [spec.name for spec in plan.inputs if spec.name in OWN_INPUTS]:
        raise InputError(f"the plan has an input {clash[0]!r}, which is the noise's name in a repository")
    model = re.sub(r"[^A-Za-z0-9_-]+", "_", name or bundle.path.resolve().name)
    graphs = {graph: f"{model}_{graph}" for graph in plan.graphs}
    try:
        with new_folder(path) as folder:
            weights = _Weights(bundle.path / WEIGHTS)
            sessions = _sessions(bundle)
            feeds = _feeds(plan, sessions, bundle.tables())
            ports: dict[str, list[PortInfo]] = {}
            for graph, graph_model in graphs.items():
                inputs, outputs = _ports(sessions[graph], plan, graph)
                ports[graph] = inputs
                config = graph_config(graph_model, inputs, outputs, feeds[graph], max_batch)
                version = _model(folder / graph_model, config)
                _write_graph(bundle.graph_files()[graph], version / "model.onnx")
                weights.place(version / WEIGHTS)
                _write_warm_up(folder / graph_model / "warmup", feeds[graph])
            image = next(PortInfo(s.name, s.dtype, s.shape) for s in plan.state if s.name == plan.output)
            version = _model(folder / model, player_config(model, plan, image, max_batch))
            (version / "plan.json").write_text(_plan_json(bundle, plan, graphs, ports), encoding="utf-8")
            if plan.tables:
                weights.place(version / WEIGHTS)
            player = files("qexport.ship").joinpath(PLAYER).read_text(encoding="utf-8")
            (version / "model.py").write_text(player, encoding="utf-8")
            readme = _readme(bundle, plan, model, graphs)
            (folder / "README.md").write_text(readme, encoding="utf-8")
    except OSError as error:
        raise explain_os_error(error, path) or error from error
    inodes = {(s.st_dev, s.st_ino): s.st_size for s in (f.stat() for f in path.rglob("*") if f.is_file())}
    return Repository(path, (model, *graphs.values()), sum(inodes.values()))


class _Weights:
    """One file in several places: a copy, and links to it where they are possible."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._copy: Path | None = None

    def place(self, target: Path) -> None:
        if self._copy is not None:
            try:
                os.link(self._copy, target)
                return
            except OSError:  # a file system without links
                pass
        shutil.copyfile(self._source, target)
        self._copy = target


def _sessions(bundle: Bundle) -> dict[str, onnxruntime.InferenceSession]:
    config = session_config("cpu", "exact", quant_traits(bundle.manifest))
    return {name: make_session(file, bundle.path, config) for name, file in bundle.graph_files().items()}


def _ports(session: onnxruntime.InferenceSession, plan: Plan, graph: str) -> tuple[list[PortInfo], list[PortInfo]]:
    """Inputs of a graph as `_write_graph` leaves them, and those of its outputs that the plan uses."""
    used = {port for call in plan.calls if call.graph == graph for port in call.outputs}
    backend = OrtBackend({graph: session}, "cpu")
    inputs = [PortInfo(name, port.dtype, port.shape or (1,)) for name, port in backend.inputs(graph).items()]
    dtypes = {s.name: s.dtype for s in plan.state}
    names = {port: name for call in plan.calls if call.graph == graph for port, name in call.outputs.items()}
    outputs = [
        PortInfo(o.name, dtypes[names[o.name]], tuple(d if isinstance(d, int) else str(d) for d in o.shape))
        for o in session.get_outputs()
        if o.name in used
    ]
    return inputs, outputs


def _feeds(
    plan: Plan, sessions: Mapping[str, onnxruntime.InferenceSession], tables: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Real inputs of each graph, from the first iterations of the plan."""
    calls = tuple(
        replace(call, each=call.each[:WARM_UP_ITERATIONS], repeat=min(call.repeat, WARM_UP_ITERATIONS))
        for call in plan.calls
    )
    short = replace(plan, calls=calls, schedules={}, schedule="")
    backend = OrtBackend(sessions, "cpu")
    found: dict[str, dict[str, np.ndarray]] = {}

    def keep(record: CallRecord[Any]) -> None:
        found[record.graph] = {port: np.array(backend.get(value)) for port, value in record.feeds.items()}

    port = label_input(plan)
    inputs = {} if port is None else {port.name: np.zeros(WARM_UP_BATCH, port.dtype)}
    Player(short, backend, tables).play(inputs, batch=WARM_UP_BATCH, observer=keep)
    return found


def _write_graph(file: Path, out: Path) -> None:
    """A copy of a graph in which no input is without dimensions: Triton 2.51 refuses to load a model that has one.

    Such an input gets one dimension, and a Squeeze behind it. Weights stay where they are, in the file beside it.
    """
    import onnx_ir as ir

    model = ir.load(file)
    for value in model.graph.inputs:
        if value.shape is not None and not value.shape:
            squeeze = ir.node("Squeeze", [None], name=f"{value.name}.squeeze")
            scalar = squeeze.outputs[0]
            scalar.name, scalar.type, scalar.shape = f"{value.name}.scalar", value.type, ir.Shape([])
            value.replace_all_uses_with(scalar)
            squeeze.replace_input_with(0, value)
            value.shape = ir.Shape([1])
            model.graph.insert_before(model.graph[0], squeeze)
    ir.save(model, out)


def _model(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model's folder with its configuration; returns the folder of version 1."""
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(dumps(config), encoding="utf-8")
    return version


def _write_warm_up(folder: Path, feeds: Mapping[str, np.ndarray]) -> None:
    folder.mkdir()
    for port, array in feeds.items():
        if array.nbytes <= MAX_WARM_UP_BYTES:
            (folder / port).write_bytes(np.ascontiguousarray(array).tobytes())


def _plan_json(bundle: Bundle, plan: Plan, graphs: Mapping[str, str], ports: Mapping[str, Sequence[PortInfo]]) -> str:
    data = {
        "bundle": bundle.manifest.digest,
        "plan": plan.to_json(),
        "graphs": {
            graph: {
                "model": model,
                "inputs": {port.name: {"dtype": port.dtype, "shape": list(port.shape)} for port in ports[graph]},
            }
            for graph, model in graphs.items()
        },
    }
    return json.dumps(data, indent=1) + "\n"


def _readme(bundle: Bundle, plan: Plan, model: str, graphs: Mapping[str, str]) -> str:
    template = files("qexport.ship").joinpath("triton_readme.md").read_text(encoding="utf-8")
    settings = "\n".join(
        f"| `{spec.name}` | {spec.dtype} | {'required' if spec.default is None else spec.default} | {spec.doc} |"
        for spec in plan.inputs
    )
    label = label_input(plan)
    return template.format(
        model=model,
        source=bundle.manifest.model.name,
        scheme=bundle.manifest.scheme,
        digest=bundle.manifest.digest,
        graphs="\n".join(f"- `{name}`: the graph `{graph}`, ONNX Runtime backend" for graph, name in graphs.items()),
        settings=settings,
        schedule=f" Its sampler is {plan.schedule}." if plan.schedule else "",
        label=label.name if label else "label",
        output=plan.output,
    )
