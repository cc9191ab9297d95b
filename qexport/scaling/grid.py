"""The grid of a sweep: which model in which format by which method, each once, combinations that do not exist left out.

A *series* is the sizes of one architecture: ``var-c10`` is var-c10-d2, var-c10-d3, … A *run* is one cell of the grid.
What determines its result (the run, the weights it starts from, how it is measured) makes its key: equal keys, equal
figures, so that a run is never made twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qexport.errors import InputError
from qexport.family import ModelEntry, families, find_model
from qexport.formats import get_format
from qexport.methods import METHODS, parse_method
from qexport.scheme import DEFAULT_GROUP_SIZE, PerChannel, PerGroup, Scheme, TensorSpec
from qexport.suggest import nearest

FULL = "fp16"
"""The format of a run that quantises nothing: matrices in fp16, as a bundle stores what no rule names."""

FULL_BITS = 16
NO_METHOD = "none"

TOPKLD = "topkld"
"""Fine-tuning by `qexport.distill`; of a denoiser, which has no logits, by squared error of its output: the control."""

START = "gptq"
"""Where fine-tuning starts."""

KINDS: Mapping[str, Mapping[int, str]] = {
    "int": {2: "int2", 3: "int3", 4: "int4", 6: "int6", 8: "int8"},
    "fp": {4: "fp4-e2m1", 6: "fp6-e3m2", 8: "fp8-e4m3"},
}
"""Kind of number → width → format."""

MEASURE_VERSION = 1
"""Part of every key; to be raised when the same run would be measured otherwise."""

_SIZE = re.compile(r"-(?:d\d+|s|b|l|xl|xxl|3b)(?=-|$)")


def series_of(model: str) -> str:
    """A model's name without its size: ``var-c10-d2`` → ``var-c10``, ``dit-xl-2-256`` → ``dit-2-256``."""
    return _SIZE.sub("", model)


def size_of(model: str) -> str:
    """The part that `series_of` leaves out, or the whole name: ``d2``."""
    found = _SIZE.search(model)
    return found[0].removeprefix("-") if found else model


@dataclass(frozen=True)
class Measurement:
    """How every run is measured; what decides the result.

    Args:
        images_sha256: digest of the real images, None where the full-precision model draws its own.
        features_sha256: digest of Inception's weights and of its reference, None for the model's own features.
        judged_tokens: images on which a model that draws tokens is judged, spread evenly over those given.
        judged_latents: the same of a denoiser.
        drawn: images that the model draws itself, where none are given.
        trajectories: of a denoiser, from the same noise as the full-precision model's.
        fd: images generated for FD; 0 leaves it out.
        seed: of all that is drawn.
        topkld_steps: updates of fine-tuning.
        topkld_batch: samples of an update. Rows from before there was a choice do not name it: they had 16, and rates
            of 0.01 (weights), 0.007 (scales) and 0 (what is not quantised) whatever the error.
        topkld_samples: samples that the teacher draws for it.
    """

    images_sha256: str | None = None
    judged_tokens: int = 500
    judged_latents: int = 250
    drawn: int = 64
    trajectories: int = 20
    fd: int = 500
    seed: int = 0
    topkld_steps: int = 400
    topkld_batch: int = 8
    topkld_samples: int = 512
    features_sha256: str | None = None

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            InputError: naming the one that is too small.
        """
        least = {"seed": 0, "fd": 0, "topkld_samples": 65}  # 64 are held out
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < least.get(name, 1):
                raise InputError(f"{name} is {value}; it must be at least {least.get(name, 1)}")
        if self.fd == 1:
            raise InputError("FD of 1 image; at least 2 are needed, or 0 to leave it out")


@dataclass(frozen=True)
class Run:
    """One cell: `model` in `number_format` (a name in `qexport.formats`, or `FULL`) by `method`."""

    model: str
    number_format: str = FULL
    method: str = NO_METHOD

    @property
    def series(self) -> str:
        """See module."""
        return series_of(self.model)

    @property
    def bits(self) -> int:
        """Nominal width of a weight."""
        return FULL_BITS if self.number_format == FULL else get_format(self.number_format).bits

    @property
    def kind(self) -> str:
        """``int`` or ``fp``; full precision is ``fp``."""
        return "fp" if self.number_format == FULL else get_format(self.number_format).kind.replace("float", "fp")

    @property
    def trained(self) -> bool:
        """Whether it is fine-tuned."""
        return self.method == TOPKLD

    @property
    def scheme(self) -> Scheme:
        """8 bits with a scale per output channel, fewer in groups of 32, as the presets have it; activations as is."""
        if self.number_format == FULL:
            return Scheme(None, None)
        granularity = PerChannel() if self.bits == 8 else PerGroup(DEFAULT_GROUP_SIZE)
        return Scheme(TensorSpec(get_format(self.number_format), granularity), None)

    def __str__(self) -> str:
        return f"{self.model} {self.number_format}" + ("" if self.method == NO_METHOD else f" {self.method}")


@dataclass(frozen=True)
class Dropped:
    """What of the grid is not run, and why."""

    what: str
    reason: str


def key_of(run: Run, checkpoint_sha256: Mapping[str, str], how: Measurement, version: str) -> str:
    """SHA-256 of everything that determines a run's result.

    Args:
        run: the cell.
        checkpoint_sha256: role → digest of the model's files.
        how: the measurement; of fine-tuning's settings only where there is any.
        version: qexport's.
    """
    settings = describe(how)
    if not run.trained:
        settings = {name: value for name, value in settings.items() if not name.startswith("topkld")}
    content = {
        "run": asdict(run),
        "weight": str(run.scheme.weight),
        "checkpoints": dict(checkpoint_sha256),
        "measurement": settings,
        "measure_version": MEASURE_VERSION,
        "version": version,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_grid(
    models: Sequence[str], wbits: Sequence[int], kinds: Sequence[str], methods: Sequence[str]
) -> tuple[list[Run], list[Dropped]]:
    """The runs in the order in which they are made, and what was left out.

    16 bits are one run per model. Small models come first, fine-tuning last: a sweep that is cut off has its cheapest
    answers.

    Raises:
        InputError: an unknown name, a width that no kind has, or nothing left to run.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--formats: {kind!r} is unknown{nearest(kind, KINDS)}; use {', '.join(KINDS)}")
    known = sorted({FULL_BITS}.union(*KINDS.values()))
    for width in wbits:
        if width not in known:
            raise InputError(f"--wbits: {width} is no width of any format; there are {', '.join(map(str, known))}")
    for method in methods:
        if method != TOPKLD and parse_method(method).algorithm == "ternary":
            raise InputError("--methods: ternary is a format of its own and no method of these formats; leave it out")
    size = {name: find_model(name)[1].parameters for name in models}
    runs: dict[Run, None] = {}
    dropped: dict[Dropped, None] = {}
    for model in models:
        for width in wbits:
            if width == FULL_BITS:
                runs[Run(model)] = None
                continue
            for kind in kinds:
                if width not in KINDS[kind]:
                    has = ", ".join(map(str, sorted(KINDS[kind])))
                    dropped[Dropped(f"{kind}{width}", f"{kind} has {has} bits")] = None
                    continue
                runs.update(dict.fromkeys(Run(model, KINDS[kind][width], method) for method in methods))
    if not runs:
        raise InputError("nothing to run: " + "; ".join(f"{d.what}: {d.reason}" for d in dropped))
    order = sorted(runs, key=lambda run: (run.trained, size[run.model], run.model, -run.bits, run.kind, run.method))
    return order, list(dropped)


def models_of(series: Iterable[str], given: Mapping[str, str]) -> tuple[list[str], list[Dropped]]:
    """The models of these series, small first; those without bundled weights only where `given` names a file.

    Raises:
        InputError: a series without models.
    """
    entries = [entry for family in families() for entry in family.entries]
    found: list[ModelEntry] = []
    dropped = []
    for name in series:
        members = [entry for entry in entries if name in (series_of(entry.name), entry.name)]
        if not members:
            known = sorted({series_of(entry.name) for entry in entries})
            raise InputError(f"--families: {name!r} is unknown{nearest(name, known)}; there are {', '.join(known)}")
        for entry in members:
            if entry.bundled or entry.name in given:
                found.append(entry)
            else:
                dropped.append(Dropped(entry.name, f"not bundled; pass --checkpoint {entry.name}=FILE"))
    names = [entry.name for entry in sorted(found, key=lambda entry: (entry.parameters, entry.name))]
    return list(dict.fromkeys(names)), dropped


def check_method(name: str) -> str:
    """`name`, if a sweep knows it.

    Raises:
        InputError: it does not.
    """
    if name != TOPKLD:
        try:
            parse_method(name)
        except InputError:
            known = (*METHODS, TOPKLD)
            raise InputError(
                f"--methods: {name!r} is unknown{nearest(name, known)}; there are {', '.join(known)}"
            ) from None
    return name


def describe(how: Measurement) -> dict[str, Any]:
    """Plain data; without Inception the same as before there was any, so that no stored run is made again."""
    return {name: value for name, value in asdict(how).items() if name != "features_sha256" or value is not None}
