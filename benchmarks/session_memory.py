"""Where the memory of sessions goes on the CPU provider: weights, copies made while loading, activations.

    python benchmarks/session_memory.py --out benchmarks/results/session_memory          (DiT-B/2 at 4 bits)
    python benchmarks/session_memory.py --bundle B --batches 1                           (a bundle made before)
    python benchmarks/session_memory.py --bundle B --target ort-cpu                      (and lowered: `qexport lower`)

A bundle and its float32 twin are loaded under several settings of ONNX Runtime, each in a process of its own, one
thread. Shown is resident memory above the same process before any session, in MB of 10⁶ bytes:

    floor      the weights as the kernels read them (codes and scales, or floats): what no session can be smaller than
    a graph    when its session was made, on top of those before
    …, trim    after `malloc_trim(0)`: the difference was free, but the C library had not given it back; qexport does
               this for every session that it makes, and here it is shown apart
    batch n    after two batches of n (the plan's first `--calls` calls), which leave the arena of activations behind

Figures are "anonymous + file": the process's own pages, and pages of mapped files, which the kernel can drop.
How busy the machine is does not change them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SEED = 0
MB = 1e6
TRIMMED = "trim"


@dataclass(frozen=True)
class Case:
    """Settings of ONNX Runtime that differ from the product's; `shared`: one arena for all sessions of the process."""

    name: str
    entries: Mapping[str, str] = field(default_factory=dict)
    arena: bool = True
    pattern: bool = True
    shared: bool = False


CASES = (
    Case("as they are"),
    Case("initialisers outside the arena", {"session.use_device_allocator_for_initializers": "1"}),
    Case("no arena", arena=False),
    Case("one arena that grows as asked", {"session.use_env_allocators": "1"}, shared=True),
    Case("no memory pattern", pattern=False),
    Case("no prepacking", {"session.disable_prepacking": "1"}),
    Case("accuracy level 0", {"session.qdq_matmulnbits_accuracy_level": "0"}),
)
AS_REQUESTED = 1
"""ONNX Runtime's `arena_extend_strategy`; 0, its default, grows by powers of two."""


def make_bundle(model: str, wbits: int, folder: str) -> None:
    """A bundle of random weights: memory does not depend on them."""
    from qexport.pipeline import quantize
    from qexport.request import Request
    from qexport.scheme import preset

    quantize(model, request=Request(preset(wbits, 16)), random_weights=SEED, out=folder)


def make_twin(bundle: str, folder: str) -> None:
    """Its float32 twin."""
    from qexport.bench.reference import write_twin
    from qexport.bundle import Bundle

    write_twin(Bundle.open(bundle, "size"), Path(folder), "fp32", "cpu")


def measure(
    pipe: Connection, bundle: str, target: str | None, twin: str | None, case: Case, batches: Sequence[int], calls: int
) -> None:
    """One case: stage → {"anonymous": bytes, "file": bytes}, to the pipe."""
    from qexport.bench.memory import resident_by_kind
    from qexport.bench.reference import FOLDER
    from qexport.bundle import Bundle
    from qexport.runtime import Player
    from qexport.runtime.clock import play_once, some_labels
    from qexport.runtime.heap import give_back_freed
    from qexport.runtime.ort_backend import OrtBackend
    from qexport.runtime.runtime import quant_traits
    from qexport.runtime.session import model_of, open_session, session_options
    from qexport.targets import QuantTraits, session_config

    opened = Bundle.open(bundle, "size")
    before = resident_by_kind()
    if before is None:
        pipe.send({"failed": "this system does not tell resident memory by kind"})
        return
    stages: dict[str, dict[str, int]] = {}

    def note(stage: str) -> None:
        now = resident_by_kind()
        assert now is not None
        stages[stage] = asdict(now.above(before))

    if case.shared:
        share_arena()
    sessions = {}
    root = Path(twin) if twin else opened.path
    for graph, file in opened.graph_files(target).items():
        traits = QuantTraits() if twin else quant_traits(opened.manifest, graph)
        config = session_config("cpu", "serve", traits)
        config = replace(config, entries={**config.entries, **case.entries})
        options = session_options(config, 1)
        options.enable_cpu_mem_arena, options.enable_mem_pattern = case.arena, case.pattern
        path = root / FOLDER / f"{graph}.onnx" if twin else file
        sessions[graph] = open_session(model_of(path, root, options), options, config, str(path))
        note(graph)
        give_back_freed()
        note(f"{graph}, {TRIMMED}")
    player = Player(opened.plan, OrtBackend(sessions, "cpu"), opened.tables())
    for batch in batches:
        labels = some_labels(player, batch, opened.manifest.model.num_classes)
        for _ in range(2):  # the second run is the first that follows a memory pattern
            play_once(player, labels, batch, calls or None)
        note(f"batch {batch}")
        give_back_freed()
        note(f"batch {batch}, {TRIMMED}")
    pipe.send(stages)


def share_arena() -> None:
    """Register an arena with the process, for sessions that ask for it."""
    import onnxruntime

    kind, use = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    settings = onnxruntime.OrtArenaCfg({"arena_extend_strategy": AS_REQUESTED})
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, use), settings)


def in_a_process(target: Any, *arguments: Any) -> Any:
    """What `target(pipe, …)` sends from a fresh process; a sentence where that process broke off."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=target, args=(end, *arguments))
    process.start()
    end.close()
    try:
        return pipe.recv()
    except EOFError:
        return {"failed": "its process ended without an answer"}
    finally:
        process.join()


def prepared(pipe: Connection, model: str, wbits: int, bundle: str, target: str | None, made: bool, twin: str) -> None:
    """Bundle and twin on disk; sends the floor of each graph in bytes, by form."""
    from qexport.bench.reference import FOLDER
    from qexport.bench.roofline import weight_bytes
    from qexport.bundle import Bundle

    if not made:
        make_bundle(model, wbits, bundle)
    make_twin(bundle, twin)
    files = Bundle.open(bundle, "size").graph_files(target)
    floors = {
        "quantised": {graph: weight_bytes(file) for graph, file in files.items()},
        "fp32": {graph: weight_bytes(Path(twin) / FOLDER / f"{graph}.onnx") for graph in files},
    }
    pipe.send(floors)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table."""
    lines = [f"# Session memory, CPU provider, {report['subject']}, MB (anonymous + file)", ""]
    for form, graphs in report["floor_bytes"].items():
        parts = ", ".join(f"{graph} {size / MB:.0f}" for graph, size in graphs.items())
        lines.append(f"- floor of {form}: {sum(graphs.values()) / MB:.0f} ({parts})")
    stages = next((list(row["stages"]) for row in report["rows"] if "failed" not in row["stages"]), [])
    lines += ["", "| form | settings | " + " | ".join(stages) + " |", "|---|---|" + "---|" * len(stages)]
    for row in report["rows"]:
        held = row["stages"]
        if "failed" in held:
            cells = [f"failed: {held['failed']}"] + ["–"] * (len(stages) - 1)
        else:
            cells = [f"{held[stage]['anonymous'] / MB:.0f} + {held[stage]['file'] / MB:.0f}" for stage in stages]
        lines.append(f"| {row['form']} | {row['case']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="dit-b-2-256")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--bundle", type=Path, help="one made before, in place of --model")
    parser.add_argument("--target", help="its graphs that were lowered to this, in place of the portable ones")
    parser.add_argument("--cases", help="comma-separated names; all by default")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--calls", type=int, default=1, help="the plan's first calls of graphs; 0 plays whole images")
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    args = parser.parse_args(argv)
    if args.target and not args.bundle:
        parser.error("--target needs --bundle, one that `qexport lower` was run on")
    cases = CASES if args.cases is None else tuple(case for case in CASES if case.name in args.cases.split(","))
    batches = [int(size) for size in args.batches.split(",") if size]
    with tempfile.TemporaryDirectory(prefix="qexport-session-memory-") as folder:
        bundle, twin = str(args.bundle or Path(folder) / "bundle"), str(Path(folder) / "twin")
        Path(twin).mkdir()
        floors = in_a_process(prepared, args.model, args.wbits, bundle, args.target, args.bundle is not None, twin)
        if "failed" in floors:
            raise SystemExit(f"no bundle: {floors['failed']}, see above")
        report: dict[str, Any] = {
            "command": "python benchmarks/session_memory.py",
            "subject": args.bundle.name if args.bundle else f"{args.model}, {args.wbits} bits",
            "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("out", "bundle")},
            "floor_bytes": floors,
            "rows": [],
        }
        for case in cases:
            for form, where in (("quantised", None), ("fp32", twin)):
                stages = in_a_process(measure, bundle, args.target, where, case, batches, args.calls)
                report["rows"].append({"form": form, "case": case.name, "stages": stages})
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
