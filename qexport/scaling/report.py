"""The findings as Markdown, for a page of documentation: how it was measured, what follows, every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qexport.family import INCEPTION
from qexport.scaling.figures import FD
from qexport.scaling.findings import Finding
from qexport.scaling.grid import Measurement
from qexport.scaling.select import Selection
from qexport.scaling.store import Row

_SHOWN = ("kl", "top1_agreement", "cross_entropy", "output_mse", "loss", "trajectory_error", FD)
_HEADS = {
    "kl": "KL", "top1_agreement": "top-1", "cross_entropy": "cross-entropy", "output_mse": "output error",
    "loss": "loss", "trajectory_error": "trajectory error", FD: "FD",
}  # fmt: skip


def command_of(selection: Selection) -> str:
    """A command that measures every run of the selection (and what lies between, where the grid has holes)."""
    rows = list(selection.rows.values())
    models = sorted({row.run.model for row in rows})
    bits = sorted({row.run.bits for row in rows})
    kinds = sorted({row.run.kind for row in rows if row.run.method != "none"}, reverse=True)
    methods = list(dict.fromkeys(row.run.method for row in rows if row.run.method != "none"))
    how = selection.measurement
    usual = Measurement()
    quick = (how["drawn"], how["trajectories"]) != (usual.drawn, usual.trajectories)
    parts = [
        f"qexport scaling{' --quick' if quick else ''} --models {','.join(models)}",
        f"--wbits {','.join(map(str, bits))}",
    ]
    parts += [f"--formats {','.join(kinds or ['int'])}", f"--methods {','.join(methods or ['rtn'])}"]
    parts.append(f"--samples {how['judged_tokens']} --fd {how['fd']} --seed {how['seed']}")
    if how["images_sha256"] is not None:
        parts.append("--images FILE")
    steps = {row.settings["measurement"]["topkld_steps"] for row in rows if row.run.trained}
    parts += [f"--topkld-steps {step}" for step in steps]
    return " ".join(parts)


def how_measured(selection: Selection) -> list[str]:
    """Sentences: on what, with how many, by which versions."""
    how, rows = selection.measurement, list(selection.rows.values())
    judged = sorted({row.settings["judged_on"] for row in rows})
    versions = sorted({row.version for row in rows})
    torch = sorted({row.environment.get("versions", {}).get("torch", "unknown") for row in rows})
    found = [f"{len(rows)} runs, judged on " + "; ".join(judged) + "."]
    if how["fd"]:
        names = sorted({row.measured.figures[FD]["name"] for row in rows if FD in row.measured.figures})
        verdict = "with those features it is FID" if names == [INCEPTION] else "it is not FID"
        found.append(f"FD ({', '.join(names)}) of {how['fd']} generated images; {verdict}.")
    found.append(f"Trajectories: {how['trajectories']} of each denoiser. Seed {how['seed']}, one seed of training.")
    found.append(
        "Intervals are 95 %, from resampled images, the same in all runs of a series; FD's are taken as independent."
    )
    devices = sorted({row.settings.get("device", "the CPU") for row in rows})
    found.append(f"qexport {', '.join(versions)}, torch {', '.join(torch)} in float32 on {' and '.join(devices)}.")
    training = [row.settings["training"] for row in rows if "training" in row.settings]
    if training:
        steps = sorted({item["steps"] for item in training})
        losses = ", ".join(sorted({item["loss"] for item in training}))
        found.append(
            f"topkld: {', '.join(map(str, steps))} updates from {training[0]['start_method']}, loss {losses} "
            "(denoisers have no logits: squared error of the output is their control)."
        )
    if selection.left_out:
        found.append(f"{selection.left_out} runs of the store were measured otherwise and are left out.")
    return found


def markdown(selection: Selection, found: Sequence[Finding], plots: Mapping[str, str]) -> str:
    """The text; `plots` maps a title to the path of its picture."""
    lines = ["<!-- written by `qexport scaling --from-store --report FILE`; edit what stands outside of it -->", ""]
    lines += ["How it was measured:", "", "```", command_of(selection), "```", ""]
    lines += [f"- {sentence}" for sentence in how_measured(selection)]
    topic = ""
    for item in found:
        if item.topic != topic:
            lines += ["", f"### {item.topic}", ""]
            topic = item.topic
        lines.append(f"- {item.text}" if item.shown else f"- *{item.text}*")
    if plots:
        lines += ["", "### Plots", ""]
        lines += [f"![{title}]({path})" for title, path in plots.items()]
    for series in selection.series:
        lines += ["", f"### Every run of {series}", ""]
        lines += run_table([row for run, row in selection.rows.items() if run.series == series])
    return "\n".join(lines) + "\n"


def run_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table; intervals stand in brackets."""
    names = [name for name in _SHOWN if any(name in row.measured.figures for row in rows)]
    heads = ["model", "format", "method", "bits", "MB", *(_HEADS[name] for name in names)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in sorted(rows, key=lambda r: (r.measured.cost["parameters"], -r.run.bits, str(r.run))):
        cost = row.measured.cost
        cells = [row.run.model, row.run.number_format, row.run.method, f"{cost['information_bits_per_weight']:.2f}"]
        cells.append(f"{cost['total_bits'] / 8e6:.2f}")
        cells += [cell(row.measured.figures.get(name)) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(figure: Mapping[str, Any] | None) -> str:
    """``0.0332 (0.0327–0.0337)``."""
    if figure is None:
        return ""
    low, high = figure["ci95"]
    return f"{figure['value']:.4g} ({low:.4g}–{high:.4g})"
