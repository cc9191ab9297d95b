"""What the CUDA table measures: each function here is one part, and runs in a process of its own.

A part is told a bundle (or a model), and tells what it finds, batch by batch, through `Tell`; what was told stands even
if the process is ended later. Memory is what the driver says is taken, less what was taken once a first small session
(or product, in torch) had made the context and loaded cuBLAS and cuDNN: about 500 MB that say nothing about a bundle.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
TARGET = "ort-cuda"

HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "uantizeLinear", "Norm")
"""Parts of names of operators that must not fall back to the CPU; the arithmetic of shapes rightly lies there."""

Tell = Callable[[int, dict[str, Any]], None]
"""Called with (batch, what was found for it)."""


@dataclass(frozen=True)
class Subject:
    """A model; `forward` names the graph of which one call is timed, None times whole images."""

    name: str
    forward: str | None
    batches: tuple[int, ...]
    random: bool = True


@dataclass(frozen=True)
class Form:
    """How a model is quantised; `optimised`: `--optimize latency`, for the largest batch.

    `decoder` is what decoders compute in; for subjects of whole images only, and of random weights not measured before.
    """

    name: str
    wbits: int
    abits: int = 16
    number_format: str = "int"
    optimised: bool = False
    decoder: str = "float32"


@dataclass(frozen=True)
class Runs:
    """How often, at most: warm-up, then timed; neither goes on after `seconds`, but each is at least so often."""

    warmup: int
    timed: int
    seconds: float = 10.0
    least_warmup: int = 4  # a CUDA graph of whole images: shapes, two captures for two buffers, one to see them repeat
    least_timed: int = 5


def timed(run: Callable[[], object], runs: Runs) -> dict[str, Any]:
    """Milliseconds of a call that has finished its work when it returns."""
    _repeat(run, runs.warmup, min(runs.least_warmup, runs.warmup), runs.seconds)
    ms = [1e3 * value for value in _repeat(run, runs.timed, min(runs.least_timed, runs.timed), runs.seconds)]
    return {
        "ms": round(statistics.median(ms), 3), "ms_min": round(min(ms), 3), "ms_max": round(max(ms), 3),
        "runs": len(ms),
    }  # fmt: skip


def _repeat(run: Callable[[], object], most: int, least: int, seconds: float) -> list[float]:
    found: list[float] = []
    while len(found) < most and (len(found) < least or sum(found) < seconds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


class DeviceMemory:
    """What the device lost since this was made, in bytes; None on the CPU."""

    def __init__(self, provider: str, torch_too: bool = False) -> None:
        """Make the context and load the libraries first: of torch, or of ONNX Runtime."""
        self._kept: object = None
        self._base: int | None = None
        if provider == "cuda":
            self._kept = _first_product() if torch_too else _first_session()
            self._base = self._used()

    @property
    def base(self) -> int | None:
        """What was taken before, by anyone."""
        return self._base

    def taken(self) -> int | None:
        """What has been taken since."""
        return None if self._base is None else self._used() - self._base

    def _used(self) -> int:
        from qexport.targets.ort_cuda import used_bytes

        used = used_bytes()
        if used is None:
            raise RuntimeError("the driver does not say how much memory is taken")
        return used


def _first_product() -> object:
    """A product and a convolution in torch: the context, cuBLAS and cuDNN."""
    import torch

    x = torch.zeros(1, 8, 16, 16, dtype=torch.float16, device="cuda")
    found = torch.nn.functional.conv2d(x, torch.zeros(8, 8, 3, 3, dtype=x.dtype, device="cuda")) @ x[..., :14, :14]
    torch.cuda.synchronize()
    return found


def _first_session() -> object:
    """The same in ONNX Runtime, as a session that has run and is kept."""
    import onnx
    from onnx import TensorProto, helper

    from qexport.runtime.session import open_session, session_options
    from qexport.targets import session_config
    from qexport.targets.config import QuantTraits

    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "y"], ["z"])],
        "first",
        [helper.make_tensor_value_info("x", half, [1, 8, 16, 16])],
        [helper.make_tensor_value_info("z", half, [1, 8, 14, 14])],
        [onnx.numpy_helper.from_array(np.zeros((8, 8, 3, 3), np.float16), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    config = session_config("cuda", "serve", QuantTraits())
    session = open_session(model.SerializeToString(), session_options(config), config, "a first session")
    session.run(None, {"x": np.zeros((1, 8, 16, 16), np.float16)})
    return session


# Bundles ------------------------------------------------------------------------------------------------------------


def make_part(tell: Tell, subject: Subject, form: Form, folder: str) -> None:
    """Quantise with a calibration that is just enough for scales, and lower; what is there is not made again."""
    from qexport.bundle import Bundle
    from qexport.lower import lower
    from qexport.pipeline import quantize
    from qexport.request import Request
    from qexport.scheme import preset

    largest = max(subject.batches)
    if not Path(folder).exists():
        scheme = preset(form.wbits, form.abits, number_format=form.number_format)
        weights = SEED if subject.random else None
        quantize(subject.name, request=Request(scheme, samples=1), random_weights=weights, out=folder)
    if TARGET not in Bundle.open(folder, "size").manifest.targets:
        optimize = "latency" if form.optimised else None
        known = not subject.random  # the ranges of random weights mean nothing
        lower(folder, TARGET, optimize=optimize, batch=largest, decoder_dtype=form.decoder, measure_decoder=known)
    tell(largest, {})


def forward_part(tell: Tell, bundle: Path, subject: Subject, provider: str, captured: bool, runs: Runs) -> None:
    """One call of a graph at each batch, all inputs and outputs bound; `captured`: as a CUDA graph."""
    memory = DeviceMemory(provider)
    import onnxruntime

    from qexport.bundle import Bundle
    from qexport.runtime.runtime import quant_traits
    from qexport.runtime.session import make_session
    from qexport.runtime.static_backend import GRAPH_ID, NOT_CAPTURED
    from qexport.targets import ort_cuda, session_config

    opened = Bundle.open(bundle, check="size")
    graph = str(subject.forward)
    config = session_config(provider, "serve", quant_traits(opened.manifest, graph))
    config = ort_cuda.captured(config) if captured else config
    session = make_session(opened.graph_files(TARGET)[graph], opened.path, config)
    loaded = memory.taken()
    kept = []  # a CUDA graph replays on the addresses that it saw
    for batch in subject.batches:
        binding = session.io_binding()
        for name, array in feeds(session, batch).items():
            kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array, config.device, 0))
            binding.bind_ortvalue_input(name, kept[-1])
        for output in session.get_outputs():
            binding.bind_output(output.name, config.device, 0)
        first, options = onnxruntime.RunOptions(), onnxruntime.RunOptions()
        if captured:  # without an id the first run would capture, and the next batch replay that graph
            first.add_run_config_entry(GRAPH_ID, NOT_CAPTURED)
            options.add_run_config_entry(GRAPH_ID, str(batch))
        session.run_with_iobinding(binding, first)
        if captured:
            for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
                kept.append(value)
                binding.bind_ortvalue_output(output.name, value)

        def run(binding: Any = binding, options: Any = options) -> None:
            session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        found = timed(run, runs)
        tell(batch, {**found, "device_bytes_loaded": loaded, "device_bytes_after": memory.taken()})


def feeds(session: Any, batch: int) -> dict[str, np.ndarray]:
    """Something for every input: noise, class 1, timesteps and scales of 1."""
    rng = np.random.default_rng(SEED)
    found = {}
    for port in session.get_inputs():
        shape = [batch if isinstance(size, str) else size for size in port.shape]
        if "int64" in port.type:
            found[port.name] = np.ones(shape, np.int64)
        elif port.name == "row" or not shape:
            found[port.name] = np.ones(shape, np.float32)
        else:
            found[port.name] = rng.normal(size=shape).astype(np.float32)
    return found


@dataclass(frozen=True)
class Played:
    """A whole bundle, ready to play; `uncaptured` are graphs that ONNX Runtime refused to take as CUDA graphs."""

    player: Any
    classes: int
    backend: Any
    sessions: Mapping[str, Any]
    uncaptured: tuple[str, ...] = ()

    def image(self, batch: int) -> Callable[[], object]:
        """A call that makes `batch` images."""
        labels = [i % self.classes for i in range(batch)]
        return lambda: self.player.play({"label": labels})


def open_player(
    bundle: Path,
    provider: str,
    captured: bool = False,
    options: Mapping[str, str] | None = None,
    fewest: bool = False,
    profiles: Path | None = None,
) -> Played:
    """All sessions of a bundle and its player.

    Args:
        bundle: its folder.
        provider: ``"cpu"`` or ``"cuda"``.
        captured: buffers at fixed addresses, and on CUDA every graph that allows it as a CUDA graph.
        options: options of the provider to put over its own.
        fewest: play by the schedule of the fewest steps, where there are any.
        profiles: a folder; every session writes a profile there.
    """
    from qexport.bundle import Bundle
    from qexport.runtime import Player
    from qexport.runtime.captured import captured_sessions
    from qexport.runtime.ort_backend import OrtBackend
    from qexport.runtime.runtime import quant_traits
    from qexport.runtime.session import model_of, open_session, session_options
    from qexport.runtime.static_backend import StaticBackend, check_plan
    from qexport.targets import SessionConfig, session_config

    def config_of(graph: str) -> SessionConfig:
        config = session_config(provider, "serve", quant_traits(opened.manifest, graph))
        return replace(config, provider_options={**config.provider_options, **(options or {})})

    def session(file: Path, config: SessionConfig) -> Any:
        made = session_options(config)
        if profiles is not None:
            made.enable_profiling = True
            made.profile_file_prefix = str(profiles / file.stem)
        return open_session(model_of(file, opened.path, made), made, config, str(file))

    opened = Bundle.open(bundle, check="size")
    files = opened.graph_files(TARGET)
    configs = {name: config_of(name) for name in files}
    on_gpu, uncaptured = captured and provider == "cuda", ()
    if on_gpu:
        sessions, uncaptured = captured_sessions(files, opened.path, configs)
    else:
        sessions = {name: session(file, configs[name]) for name, file in files.items()}
    device = next(iter(configs.values())).device
    backend = OrtBackend(sessions, device)
    if captured:
        check_plan(opened.plan)
        backend = StaticBackend(sessions, device, captured=on_gpu)
    plan = opened.plan
    if fewest and plan.schedules:
        plan = plan.with_schedule(min(plan.schedules, key=lambda name: plan.tables[plan.schedules[name]].shape[0]))
    player = Player(plan, backend, opened.tables())
    return Played(player, opened.manifest.model.num_classes, backend, sessions, uncaptured)


def image_part(tell: Tell, bundle: Path, subject: Subject, provider: str, captured: bool, runs: Runs) -> None:
    """Whole images at each batch; `captured`: on fixed addresses, its graphs as CUDA graphs."""
    memory = DeviceMemory(provider)
    played = open_player(bundle, provider, captured)
    loaded = memory.taken()
    for batch in subject.batches:
        found = timed(played.image(batch), runs)
        if captured:
            found |= {"bindings": played.backend.bindings, "uncaptured": ", ".join(played.uncaptured) or None}
        tell(batch, {**found, "device_bytes_loaded": loaded, "device_bytes_after": memory.taken()})


def bundle_part(tell: Tell, bundle: Path, provider: str, options: Mapping[str, str], profiled: bool) -> None:
    """A whole bundle: memory with all its sessions made, and after one image by the fewest steps.

    `profiled`: also how many heavy nodes ran on the CPU although another provider was asked for; profiles are kept on
    the host.
    """
    memory = DeviceMemory(provider)
    with tempfile.TemporaryDirectory() as folder:
        played = open_player(
            bundle, provider, options=options, fewest=True, profiles=Path(folder) if profiled else None
        )
        loaded = memory.taken()
        played.image(1)()
        found = {
            "device_bytes_loaded": loaded,
            "device_bytes_after": memory.taken(),
            "device_bytes_before": memory.base,
        }
        if profiled:
            found |= _fallback(played.sessions, provider)
    tell(1, found)


def _fallback(sessions: Mapping[str, Any], provider: str) -> dict[str, Any]:
    """What the profiles say: nodes that ran, those on the CPU by type, and heavy ones among them (None on the CPU)."""
    ran = {}
    for name, session in sessions.items():
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and "provider" in event.get("args", {}):
                ran[name, event["name"]] = (event["args"]["op_name"], event["args"]["provider"])
    if provider == "cpu":
        return {"fallback": None, "nodes": len(ran)}
    fallen = Counter(op for op, where in ran.values() if where == "CPUExecutionProvider")
    heavy = sum(count for op, count in fallen.items() if any(part in op for part in HEAVY))
    return {"fallback": heavy, "nodes": len(ran), "on_cpu": dict(fallen)}
