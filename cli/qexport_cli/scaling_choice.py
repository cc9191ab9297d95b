"""What the options of `qexport scaling` mean together."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import InputError

if TYPE_CHECKING:
    from qexport.scaling.grid import Dropped, Measurement, Run

DEFAULTS = {
    "--families": "var-c10,dit-c10", "--wbits": "2,3,4,6,8,16", "--formats": "int,fp", "--methods": "rtn,gptq",
    "--samples": 500, "--fd": 500, "--topkld-steps": 400,
}  # fmt: skip
QUICK = {
    "--models": "var-c10-d2,dit-c10-d2,var-c10-d3,dit-c10-d3", "--wbits": "2,3,4,8,16", "--formats": "int",
    "--samples": 100, "--fd": 50,
}  # fmt: skip
"""What `--quick` says in place of `DEFAULTS`."""

QUICK_DRAWN = 16
QUICK_TRAJECTORIES = 10

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Choice:
    """The runs, what was left out of the grid, how they are measured, and the files given."""

    runs: list[Run]
    dropped: list[Dropped]
    how: Measurement
    images: Path | None
    checkpoints: Mapping[str, str]
    inception: Path | None = None
    reference: Sequence[Path] = ()


def choose(
    options: Mapping[str, Any],
    checkpoint: list[str],
    seed: int,
    quick: bool,
    inception: Path | None = None,
    reference: Sequence[Path] = (),
) -> Choice:
    """The grid that the options stand for (by their names; None is not given).

    Raises:
        InputError: a value that is unknown, or options that contradict each other.
    """
    from qexport.family import find_model
    from qexport.scaling.grid import Measurement, check_method, models_of, plan_grid
    from qexport.scaling.sweep import digest_of

    given = {option: value for option, value in options.items() if value is not None}
    if "--models" in given and "--families" in given:
        raise InputError("--models names single models, --families series of them; leave one out")
    settings = {**DEFAULTS, **(QUICK if quick else {}), **given}
    if quick and "--families" in given:
        del settings["--models"]
    checkpoints = parse_checkpoints(checkpoint)
    if "--models" in settings:
        models, dropped = _names("--models", settings["--models"]), []
        for name in models:
            find_model(name)
    else:
        models, dropped = models_of(_names("--families", settings["--families"]), checkpoints)
    methods = [check_method(name) for name in _names("--methods", settings["--methods"])]
    runs, invalid = plan_grid(
        models, _numbers("--wbits", settings["--wbits"]), _names("--formats", settings["--formats"]), methods
    )
    images = settings.get("--images")
    digest = None if images is None else digest_of("--images", images)
    if images is not None:
        _check_images(images, dict.fromkeys(run.model for run in runs))
    quickly = {"drawn": QUICK_DRAWN, "trajectories": QUICK_TRAJECTORIES} if quick else {}
    how = Measurement(
        images_sha256=digest,
        judged_tokens=settings["--samples"], judged_latents=max(1, settings["--samples"] // 2),
        fd=settings["--fd"], seed=seed, topkld_steps=settings["--topkld-steps"],
        features_sha256=None if inception is None else _features_digest(inception, reference), **quickly,
    )  # fmt: skip
    return Choice(runs, [*dropped, *invalid], how, images, checkpoints, inception, reference)


def _check_images(images: Path, models: Iterable[str]) -> None:
    """Open the images as every one of the runs will, before any of them is claimed.

    Raises:
        InputError: there are none, or one does not fit a model.
    """
    from qexport.family import find_model
    from qexport.verify.images import open_images

    entries = [find_model(name)[1] for name in models]
    for size, classes in dict.fromkeys((entry.image_size, entry.num_classes) for entry in entries):
        try:
            opened = open_images(images, size=size, num_classes=classes)
            for i in range(len(opened)):
                opened.check(i)
        except InputError as error:
            raise InputError(f"--images {error}") from error


def _features_digest(inception: Path, reference: Sequence[Path]) -> str:
    """SHA-256 over those of the weights and of every reference."""
    from qexport.scaling.sweep import digest_of

    digests = [digest_of("--inception", inception), *(digest_of("--reference", path) for path in reference)]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def parse_checkpoints(texts: Sequence[str]) -> dict[str, str]:
    """Model → file from ``NAME=FILE``.

    Raises:
        InputError: not such a pair, no such model, or no such file.
    """
    from qexport.family import find_model

    found = dict(_pair(text) for text in texts)
    for name in found:
        find_model(name)
    return found


def parse_size(text: str) -> int:
    """Bytes from ``3MB``, ``800 kB``, ``1.5MiB`` or ``250000``.

    Raises:
        InputError: not such a size, or none at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmg]i?)?b?)\s*", text, re.IGNORECASE)
    count = 0 if match is None else round(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if count < 1:
        raise InputError(f"--budget {text!r} is not a size; write 3MB, 800kB or 1.5MiB")
    return count


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"{option} names nothing; write them with commas between")
    return list(dict.fromkeys(names))


def _numbers(option: str, text: str) -> list[int]:
    names = _names(option, text)
    for name in names:
        if not (name.isascii() and name.isdecimal()):
            raise InputError(f"{option}: {name!r} is not a number of bits; write 2,3,4")
    return [int(name) for name in names]


def _pair(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals or not name.strip() or not file.strip():
        raise InputError(f"--checkpoint {text!r}: write NAME=FILE, for example var-c10-d5=var-c10-d5.safetensors")
    if not Path(file).exists():
        raise InputError(f"--checkpoint {name}: {file}: no such file")
    return name.strip(), file.strip()
