"""What operators of a bundle take on the CPU provider, beside its fp32 twin: why a quantised graph gains what it gains.

    python benchmarks/cpu_operators.py BUNDLE [--target ort-cpu] [--batch 1] [--calls N] [--out STEM]

Both are played in turns under ONNX Runtime's profiler, which adds a few µs a node. Milliseconds of a play by operator,
median over the plays. *Products* are the operators that multiply by weights; all others are *the rest*. With the share
p of products in the twin's time and k times as fast products alone, a play would become 1 / (1 − p + p / k) times as
fast (Amdahl's law); what the rest costs more, quantising activations above all, comes off that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qexport.bench.reference import write_twin
from qexport.bundle import Bundle
from qexport.runtime import Player
from qexport.runtime.clock import TOTAL, play_once, some_labels
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import model_of, open_session, session_options
from qexport.targets import session_config
from qexport.verify.environment import describe_environment

PRODUCTS = frozenset({
    "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "QLinearMatMul", "QGemm", "MatMulNBits", "Conv", "FusedConv", "QLinearConv",
})  # fmt: skip
SUFFIX = "_kernel_time"
WARM_UP = 2


class Profiled:
    """A form of the bundle, whose sessions write down what each node takes."""

    def __init__(
        self, bundle: Bundle, files: Mapping[str, Path], root: Path, profiles: str, options: argparse.Namespace
    ) -> None:
        self.sessions = {}
        for name, file in files.items():
            config = session_config("cpu", "serve", quant_traits(bundle.manifest, name))
            made = session_options(config, options.threads)
            made.enable_profiling = True
            made.profile_file_prefix = f"{profiles}{name}"
            self.sessions[name] = open_session(model_of(file, root, made), made, config, str(file))
        self.player = Player(bundle.plan, OrtBackend(self.sessions, "cpu"), bundle.tables())
        self.inputs = some_labels(self.player, options.batch, bundle.manifest.model.num_classes)
        self.options, self.seconds = options, list[float]()

    def play(self) -> None:
        """Once."""
        self.seconds.append(play_once(self.player, self.inputs, self.options.batch, self.options.calls)[TOTAL])

    def ms(self) -> dict[str, Any]:
        """Medians over the plays after the warm-up: of a play, and of each operator; nodes of each operator."""
        plays = [Counter[str]() for _ in self.seconds]
        nodes = Counter[str]()
        for session in self.sessions.values():
            runs: dict[tuple[str, str], list[int]] = defaultdict(list)
            for event in json.loads(Path(session.end_profiling()).read_text()):
                if event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
                    runs[event["name"], event["args"]["op_name"]].append(event["dur"])
            for (_, operator), found in runs.items():
                each = len(found) // len(plays)  # a node runs equally often in every play
                nodes[operator] += 1
                for number, counter in enumerate(plays):
                    counter[operator] += sum(found[number * each : (number + 1) * each])
        counted = plays[WARM_UP:]
        return {
            "play_ms": statistics.median(self.seconds[WARM_UP:]) * 1e3,
            "operators_ms": {name: statistics.median(play[name] for play in counted) / 1e3 for name in nodes},
            "nodes": dict(nodes),
        }


def share_of_products(form: Mapping[str, Any]) -> tuple[float, float]:
    """Milliseconds of the products, and of the rest with what lies between operators."""
    products = sum(ms for name, ms in form["operators_ms"].items() if name in PRODUCTS)
    return products, form["play_ms"] - products


def table(result: Mapping[str, Any]) -> str:
    forms = result["forms"]
    names = list(forms)
    title = (
        f"# {result['bundle']}, batch {result['batch']}, {result['calls'] or 'all'} calls, {result['threads']} threads"
    )
    lines = [title, "", "| operator | " + " | ".join(f"{name}, ms (nodes)" for name in names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    operators = {name for form in forms.values() for name in form["operators_ms"]}
    largest = {name: max(form["operators_ms"].get(name, 0) for form in forms.values()) for name in operators}
    for operator in sorted(operators, key=lambda name: -largest[name]):
        cells = [
            f"{form['operators_ms'][operator]:.2f} ({form['nodes'][operator]})" if operator in form["nodes"] else ""
            for form in forms.values()
        ]
        if largest[operator] >= result["least_ms"]:
            lines.append(f"| {operator} | " + " | ".join(cells) + " |")
    lines.append("| **a play** | " + " | ".join(f"{form['play_ms']:.2f}" for form in forms.values()) + " |")
    twin_products, twin_rest = share_of_products(forms["fp32"])
    share = twin_products / (twin_products + twin_rest)
    lines.append("")
    for name in names[:-1]:
        products, rest = share_of_products(forms[name])
        gain = twin_products / products
        lines.append(
            f"- {name}: products {products:.2f} ms against {twin_products:.2f} ({gain:.2f} times as fast; they are "
            f"{share:.0%} of fp32, so {1 / (1 - share + share / gain):.2f} for the whole if the rest took no "
            f"more), the rest {rest:.2f} against {twin_rest:.2f}: "
            f"{forms['fp32']['play_ms'] / forms[name]['play_ms']:.2f} times as fast"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", help="lowered graphs; the portable ones if left out")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, help="play only the first N calls of graphs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plays", type=int, default=9, help=f"that count, after {WARM_UP} that do not")
    parser.add_argument("--least-ms", type=float, default=0.05, help="operators below it are left out of the table")
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    ours = options.target or "portable"
    with tempfile.TemporaryDirectory() as folder:
        twin = write_twin(bundle, Path(folder), "fp32", "cpu")
        forms = {
            ours: Profiled(bundle, bundle.graph_files(options.target), bundle.path, f"{folder}/ours-", options),
            "fp32": Profiled(bundle, twin, Path(folder), f"{folder}/fp32-", options),
        }
        for _ in range(WARM_UP + options.plays):
            for form in forms.values():
                form.play()
        result = {
            "bundle": options.bundle.name,
            **{name: getattr(options, name) for name in ("batch", "calls", "threads", "plays", "least_ms")},
            "environment": describe_environment("cpu"),
            "forms": {name: form.ms() for name, form in forms.items()},
        }
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
