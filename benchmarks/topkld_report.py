"""topkld_quality.md, the findings, and topkld_quality.csv, all rows: from the lines of topkld_quality.jsonl alone."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from topkld_jobs import BASELINES, HEAD, LOSSES, NO_LOSS, RATES, SCHEMES, VARIED, said
from topkld_tables import (
    BITS,
    CONFIDENCE,
    FD_IMAGES,
    FORWARD,
    NOT_SHOWN,
    RELATIVE,
    SETTING,
    figure_of,
    goals,
    in_order,
    levels,
    paired,
    title_of,
    value_of,
    verdict,
)

from qexport.distill import TOPK_LOSSES

Row = Mapping[str, Any]
Entry = dict[str, Any]

START = "gptq"
CONTROL = "output-mse"
METHODS = (*BASELINES, START)
FIGURES = {
    "kl": "KL", "kl_top900": "KL on the teacher's top-900", "cross_entropy": "CE, nats",
    "top1_agreement": "top-1, points", "top900_agreement": "top-900, points", "fd": "FD",
}  # fmt: skip
HUNDREDTHS = ("top1_agreement", "top900_agreement")

Found = Callable[[Row], float | None]


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of Markdown and an empty one; None is an empty cell."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |" for cells in body]
    return [*lines, ""]


def section(title: str, text: str, head: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    """A table with its heading; nothing where it has no rows."""
    return [f"## {title}", "", text, "", *table(head, body)] if body else []


def name_of(loss: str, top_k: int | None) -> str:
    """A loss with its K."""
    return f"`{loss}`" if top_k is None else f"`{loss}`, K {top_k}"


def kind_order(kind: tuple[str, int | None]) -> tuple[int, int]:
    """In the order of `LOSSES`, then by K."""
    return LOSSES.index(kind[0]), kind[1] or 0


def mean_of(entry: Mapping[str, Any], unit: float = 100, sign: str = " %", digits: int = 1) -> str:
    """Mean ± half the interval."""
    half = "" if entry["half"] is None else f" ± {entry['half'] * unit:.{digits}f}"
    return f"{entry['mean'] * unit:+.{digits}f}{half}{sign}"


def shown(entry: Mapping[str, Any], unit: float = 100, sign: str = " %", digits: int = 1) -> str:
    """`mean_of`, and the verdict unless nothing is shown."""
    word = "" if entry["verdict"] == NOT_SHOWN else f" **{entry['verdict']}**"
    return mean_of(entry, unit, sign, digits) + word


def usual(row: Mapping[str, Any]) -> bool:
    """Whether all of `VARIED` are what they usually are."""
    return all(row.get(name) is None for name in VARIED)


def usual_rates(row: Mapping[str, Any]) -> bool:
    """Whether `RATES` are; samples and batch may be others, which the title says."""
    return all(row.get(name) is None for name in RATES)


def at_head(entry: Mapping[str, Any]) -> bool:
    """Not one of a sweep of K."""
    return entry["top_k"] in (None, HEAD)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Of every loss, over all settings; figures one by one."""
    counts, figures = [], []
    by_figure = {name: _by_kind(filter(at_head, paired(rows, name))) for name in FIGURES}
    for kind, entries in sorted(by_figure["kl"].items(), key=lambda item: kind_order(item[0])):
        words = [entry["verdict"] for entry in entries]
        over = verdict([entry["mean"] for entry in entries])
        pairs = [difference for entry in entries for difference in entry["differences"]]
        counts.append(
            (
                name_of(*kind), len(entries), *(words.count(word) for word in ("better", "worse", NOT_SHOWN)),
                shown(over), f"{shown(verdict(pairs))} ({len(pairs)})",
            )
        )  # fmt: skip
        cells = []
        for name in FIGURES:
            means = [entry["mean"] for entry in by_figure[name].get(kind, [])]
            unit, sign = (100, " %") if name in RELATIVE else (100, "") if name in HUNDREDTHS else (1, "")
            digits = 4 if name == "cross_entropy" else 1 if name in RELATIVE else 2
            found = verdict(means, name in HUNDREDTHS) if means else None
            cells.append("" if found is None else shown(found, unit, sign, digits) + f" ({len(means)})")
        figures.append((name_of(*kind), *cells))
    lines = section(
        "Does any loss beat forward KL?",
        "Pairs of runs with one start, seed, data and number of steps; KL relative to `forward`'s, negative is better. "
        f"A setting is one model at one scheme; its verdict is by Student's interval at {CONFIDENCE:.0%} over seeds, "
        "and of twenty that are no different one is expected to be called so. Over all settings: the mean of the "
        "settings' means ± the interval over settings. Over all pairs: each as if it were its own, although those of "
        "one seed share their samples. What only one of the two shows is doubtful.",
        ("loss", "settings", "better", "worse", NOT_SHOWN, "over all settings", "over all pairs (how many)"),
        counts,
    )  # fmt: skip
    lines += section(
        "The same by every figure",
        "Difference to `forward`, over all settings (how many) as above. KL and FD relative; agreements in points of "
        f"100, where positive is better. FD of {FD_IMAGES:,} images of one seed: its interval is some per cent wide.",
        ("loss", *FIGURES.values()),
        figures,
    )
    return lines


def _by_kind(entries: Iterable[Entry]) -> dict[tuple[str, int | None], list[Entry]]:
    found: dict[tuple[str, int | None], list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry["loss"], entry["top_k"]].append(entry)
    return found


def by_scheme(rows: Sequence[Row]) -> list[str]:
    """Losses side by side, over the models of each scheme: the differences of all seeds of all models together."""
    entries = [entry for entry in paired(rows) if at_head(entry) and usual_rates(entry)]
    kinds = sorted({(entry["loss"], entry["top_k"]) for entry in entries}, key=kind_order)
    groups: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[list(SCHEMES).index(entry["scheme"]), entry["steps"], title_of(entry)].append(entry)
    body = []
    for (scheme, _, title), members in sorted(groups.items(), key=lambda item: item[0]):
        mine = _by_kind(members)
        pools = [[d for entry in mine.get(kind, []) for d in entry["differences"]] for kind in kinds]
        models = sorted({entry["model"].rpartition("-")[2] for entry in members})
        cells = ["" if not pool else f"{shown(verdict(pool))} ({len(pool)})" for pool in pools]
        body.append((list(SCHEMES)[scheme], title, " ".join(models), *cells))
    return section(
        "By scheme",
        "KL relative to `forward`'s, mean ± interval over the pairs of all models and seeds (how many pairs).",
        ("scheme", "trained", "models", *(name_of(*kind) for kind in kinds)),
        body,
    )


def sweep_of_k(rows: Sequence[Row]) -> list[str]:
    """K against forward KL, where more than one was tried."""
    groups: dict[tuple[Any, ...], dict[int, Entry]] = defaultdict(dict)
    for entry in sorted(paired(rows), key=in_order):
        if entry["loss"] in TOPK_LOSSES:
            groups[entry["model"], entry["scheme"], title_of(entry), entry["loss"]][entry["top_k"]] = entry
    groups = {names: found for names, found in groups.items() if len(found) > 1}
    columns = sorted({top_k for found in groups.values() for top_k in found})
    body = [
        (*names[:3], f"`{names[3]}`", *(shown(found[k]) if k in found else "" for k in columns))
        for names, found in groups.items()
    ]
    return section(
        "K",
        "KL relative to `forward`'s by K of the loss, mean ± interval over seeds. At K = V = 4096 `split` is `forward` "
        "but for the order of additions, and `mixed` is `reverse`.",
        ("model", "scheme", "trained", "loss", *(f"K {k}" for k in columns)),
        body,
    )


def side_by_side(rows: Sequence[Row], figure: Found, losses: Sequence[tuple[str, int | None]], digits: int) -> Any:
    """Head and lines: baselines and losses of each setting, mean ± standard deviation over seeds."""
    base: dict[tuple[str, str, str], float] = {}
    groups: dict[tuple[Any, ...], dict[tuple[str, int | None], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        value = figure(row)
        if value is None:
            continue
        if row["loss"] == NO_LOSS:
            base[row["model"], row["scheme"], row["start"]] = value
        elif usual_rates(row):
            loss = FORWARD if row["loss"] == CONTROL else row["loss"]
            groups[tuple(row.get(name) for name in SETTING)][loss, row.get("top_k")].append(value)
    for model, scheme, _ in base:  # untrained ones have a line too
        if not any(setting[:2] == (model, scheme) for setting in groups):
            groups[(model, scheme, START, None, "teacher", *(None for _ in VARIED))] = defaultdict(list)
    body = []
    for same in sorted(groups, key=lambda same: in_order(dict(zip(SETTING, same, strict=True)))):
        setting = dict(zip(SETTING, same, strict=True))
        values = [base.get((setting["model"], setting["scheme"], method)) for method in METHODS]
        cells = ["" if value is None else f"{value:.{digits}f}" for value in values]
        for kind in losses:
            found = groups[same].get(kind, [])
            mean = sum(found) / len(found) if found else 0.0
            spread = (sum((v - mean) ** 2 for v in found) / (len(found) - 1)) ** 0.5 if len(found) > 1 else None
            wide = "" if spread is None else f" ± {spread:.{digits}f}"
            cells.append(f"{mean:.{digits}f}{wide}" if found else "")
        title = "" if setting["steps"] is None else title_of(setting)
        body.append((setting["model"], setting["scheme"], title, *cells))
    head = ("model", "scheme", "trained", *(name.upper() for name in METHODS), *(name_of(*kind) for kind in losses))
    return head, body


def against_baselines(rows: Sequence[Row]) -> list[str]:
    """KL and FD of post-training methods and of what training makes of them."""
    kinds = [(FORWARD, None), *((loss, HEAD) for loss in LOSSES if loss in TOPK_LOSSES)]
    every = [(loss, HEAD if loss in TOPK_LOSSES else None) for loss in LOSSES]
    tokens, control = ([row for row in rows if ("kl" in row) == wanted] for wanted in (True, False))
    lines = section(
        "KL, post-training methods and fine-tuning",
        "Test images; mean ± standard deviation over seeds.",
        *side_by_side(tokens, figure_of, every, 5),
    )
    full = {row["model"]: row["cross_entropy_fp"] for row in tokens if "cross_entropy_fp" in row}
    lines += section(
        "Cross-entropy of the test images, nats",
        "Full precision: " + ", ".join(f"{model} {full[model]:.4f}" for model in sorted(full)) + ".",
        *side_by_side(tokens, lambda row: value_of(row, "cross_entropy"), every, 4),
    )
    lines += section(
        "Top-1 agreement with full precision",
        "Share of the positions of the test images.",
        *side_by_side(tokens, lambda row: value_of(row, "top1_agreement"), every, 3),
    )
    head, body = side_by_side(control, figure_of, [(FORWARD, None)], 5)
    lines += section(
        "The control: output error of denoisers",
        "Trained by the squared error of the teacher's output.",
        (*head[:-1], f"`{CONTROL}`"),
        body,
    )
    with_fd = [row for row in rows if value_of(row, "fd") is not None]
    lines += section(
        f"FD of {FD_IMAGES:,} images",
        "One set of noise. ± is the standard deviation over seeds of training, where more than one was played. "
        f"Denoisers: `{CONTROL}` stands under `{FORWARD}`.",
        *side_by_side(with_fd, lambda row: value_of(row, "fd"), kinds, 2),
    )
    return lines


def levels_of(rows: Sequence[Row]) -> list[str]:
    """How far curves move: one line for each model, size of groups and loss."""
    groups: dict[tuple[Any, ...], dict[str, Entry]] = defaultdict(dict)
    for entry in sorted(levels(rows, METHODS), key=in_order):
        if not usual_rates(entry):
            continue
        kept = entry["loss"] in (FORWARD, CONTROL) or (entry["loss"] in TOPK_LOSSES and entry["top_k"] == HEAD)
        base, _, size = entry["scheme"].partition(" ")
        if kept:
            groups[entry["model"], size[1:] or "32", title_of(entry), entry["loss"]][base] = entry
    body = [
        (*names[:3], f"`{names[3]}`", *(_gains(found[base]) if base in found else "" for base in BITS))
        for names, found in groups.items()
    ]
    return section(
        "Levels",
        f"How many bits more the untrained curves of {', '.join(method.upper() for method in METHODS)}, in this order, "
        "need for the same figure: mean over seeds, by straight lines in log KL (denoisers: output error) over bits. "
        "≥: beyond the curve's last point; –: no curve, or none beyond these bits.",
        ("model", "group", "trained", "loss", *BITS),
        body,
    )


def _gains(entry: Entry) -> str:
    found = [entry.get(method) for method in METHODS]
    return " / ".join("–" if gain is None else _gain(gain[0], gain[3]) for gain in found)


def _gain(mean: float, mark: str) -> str:
    if mark == "≥" and mean <= 0:
        return "–"  # "at least none" says nothing
    return f"{mark + ' ' if mark else ''}{mean:+.2f}"


def goals_of(rows: Sequence[Row]) -> list[str]:
    """What was aimed at."""
    body = []
    for goal in goals(rows):
        row = goal["row"]
        body.append(
            (
                goal["model"], goal["scheme"], goal["limit"], "" if row is None else f"{figure_of(row):#.3g}",
                "not measured" if row is None else "met" if goal["met"] else "**missed**",
                "" if row is None else name_of(row["loss"], row.get("top_k")), "" if row is None else title_of(row),
            )
        )  # fmt: skip
    return section(
        "Goals",
        "The best run of each by KL on the test images, however long it took (of the time: `docs/topkld.md`).",
        ("model", "scheme", "KL at most", "KL", "", "loss", "trained"),
        body,
    )


def rates_of(rows: Sequence[Row]) -> list[str]:
    """Runs of other than the usual settings, beside the usual one."""
    odd = [row for row in rows if row["loss"] != NO_LOSS and not usual(row)]
    same = {(row["model"], row["scheme"], row["loss"], row["steps"]) for row in odd}
    mine = [row for row in rows if (row["model"], row["scheme"], row["loss"], row.get("steps")) in same]
    used = [name for name in VARIED if any(row.get(name) is not None for row in mine)]
    body = [
        (
            row["model"], row["scheme"], name_of(row["loss"], row.get("top_k")), row["steps"], row["data"],
            *(said(row["settings"].get(name, VARIED[name])) for name in used), row["seed"], row.get("device", "cpu"),
            f"{figure_of(row):#.3g}",
        )
        for row in sorted(mine, key=lambda row: (in_order(row)[:2], row["loss"], row["steps"], figure_of(row)))
    ]  # fmt: skip
    return section(
        "Settings of training",
        "Best first. Rates are relative (`docs/topkld.md`).",
        ("model", "scheme", "loss", "steps", "data", *used, "seed", "device", "KL or output error"),
        body,
    )


def costs_of(rows: Sequence[Row]) -> list[str]:
    """Seconds and memory by model and loss."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["loss"] != NO_LOSS and row.get("batch") is None:
            groups[row["model"], row.get("device", "cpu"), row["loss"]].append(row)
    body = []
    for (model, device, loss), members in sorted(groups.items()):
        seconds = sorted(row["wall_s"] * 100 / row["steps"] for row in members)
        peaks = [[row["held_out"].get(name, 0) / 1e6 for row in members] for name in ("peak_device_bytes", _HOST)]
        device_mb, host_mb = (max(found) for found in peaks)
        body.append(
            (
                model, device, f"`{loss}`", len(members), f"{seconds[len(seconds) // 2]:.1f}",
                f"{seconds[0]:.1f} … {seconds[-1]:.1f}", f"{device_mb:.0f}" if device_mb else "", f"{host_mb:.0f}",
            )
        )  # fmt: skip
    return section(
        "Seconds and memory",
        "Of training, judgements on held-out samples included; other processes shared the device. Memory: the greatest "
        "of the device, by what PyTorch allocated, and of the process.",
        ("model", "device", "loss", "runs", "s per 100 steps, median", "range", "device MB", "process MB"),
        body,
    )


_HOST = "peak_memory_bytes"


def pairs_of(rows: Iterable[Row]) -> list[str]:
    """Every setting with its verdict."""
    body = []
    for entry in sorted(
        paired(rows), key=lambda entry: (*in_order(entry), *kind_order((entry["loss"], entry["top_k"])))
    ):
        values = entry["differences"]
        half = "" if entry["half"] is None else f"{entry['half']:.1%}"
        body.append(
            (
                entry["model"], entry["scheme"], title_of(entry), name_of(entry["loss"], entry["top_k"]), len(values),
                f"{entry['mean']:+.1%}", f"{min(values):+.1%} … {max(values):+.1%}", half, entry["verdict"],
            )
        )  # fmt: skip
    return section(
        "All pairs",
        f"KL relative to `forward`'s with the same seed; ± is Student's interval at {CONFIDENCE:.0%}.",
        ("model", "scheme", "trained", "loss", "seeds", "mean", "range", "±", "verdict"),
        body,
    )


def report(rows: Sequence[Row]) -> str:
    """The Markdown file."""
    devices = sorted({row.get("device", "cpu") for row in rows})
    trained = sum(row["loss"] != NO_LOSS for row in rows)
    lines = [
        "# What distillation makes of the reference models",
        "",
        "Made by `python benchmarks/topkld_quality.py` (its header says how everything is measured) from",
        f"`topkld_quality.jsonl`: {trained} trained runs and {len(rows) - trained} untrained,",
        f"on {' and '.join(devices)}. Every row with all figures: `topkld_quality.csv`.",
        "Block matrices only; 500 test images (DiT: 250). `split`, `mixed` and `boosted` are three readings of TopKLD;",
        f"K is {HEAD} where none is named, training starts from GPTQ and sees the teacher's own samples unless said.",
        "",
        *goals_of(rows), *verdicts(rows), *by_scheme(rows), *sweep_of_k(rows), *levels_of(rows),
        *against_baselines(rows), *rates_of(rows), *costs_of(rows), *pairs_of(rows),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


PLAIN = (
    "model", "scheme", "start", "loss", "top_k", "seed", "steps", "data", "kl", "output_mse", "kl_top900",
    "cross_entropy", "top1_agreement", "top900_agreement",
)  # fmt: skip


def as_csv(rows: Sequence[Row]) -> str:
    """All rows; settings that are unusual somewhere have a column."""
    used = [name for name in VARIED if any(row.get(name) is not None for row in rows)]
    head = (
        *PLAIN, *used, "fd", "fd_low", "fd_high", "fd_images", "information_bits_per_weight", "wall_s", "best_step",
        "peak_memory_bytes", "peak_device_bytes", "device",
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, head, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (row["model"], list(SCHEMES).index(row["scheme"]))):
        cells = dict(row) | row.get("held_out", {}) | {"wall_s": row["wall_s"], "start": row["start"]}
        settings = row.get("settings")
        cells |= {name: "" if settings is None else said(settings.get(name, VARIED[name])) for name in used}
        fd = row.get("fd")
        if fd is not None:
            cells |= {"fd": fd["value"], "fd_low": fd["ci95"][0], "fd_high": fd["ci95"][1], "fd_images": fd["n"]}
        cells["device"] = row.get("device", "cpu")
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in cells.items() if v is not None})
    return text.getvalue()
