"""Options that several commands share, and how lists in them are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qexport.errors import InputError

MAX_LISTED = 100_000
"""Longest list that a range may stand for; beyond it the range is a slip of the keyboard."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
ProviderOption = Annotated[
    str, typer.Option("--provider", metavar="auto|cpu|cuda", help="Where to run; auto takes CUDA where there is a GPU.")
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", metavar="FILE", help="Weights of the generator, where not bundled.")
]
VaeCheckpointOption = Annotated[
    str | None, typer.Option("--vae-checkpoint", metavar="FILE", help="Weights of the decoder, where not bundled.")
]


def parse_classes(text: str, count: int) -> list[int]:
    """Class numbers from ``"1,8"`` or ``"0-3,7"``; `count` is how many classes the model has.

    Raises:
        InputError: not such a list, a range that runs backwards, or a class that the model lacks.
    """
    classes: list[int] = []
    for item in text.split(","):
        first, dash, last = (part.strip() for part in item.partition("-"))
        if not _is_number(first) or (dash and not _is_number(last)):
            raise InputError(f"--classes {text!r}: {item.strip()!r} is not a class number; write 1,8 or 0-9")
        start, stop = int(first), int(last) if dash else int(first)
        if stop < start:
            raise InputError(f"--classes {text!r}: the range {item.strip()!r} runs backwards")
        if stop >= count:
            raise InputError(f"--classes {text!r}: this model has no class {stop}; it has 0 to {count - 1}")
        classes += range(start, stop + 1)
        if len(classes) > MAX_LISTED:
            raise InputError(f"--classes: names more than {MAX_LISTED} classes")
    return classes


def parse_settings(pairs: list[str]) -> dict[str, float | int]:
    """Inputs of the sampling plan from ``["cfg=1.5", …]``.

    Raises:
        InputError: not ``name=number``, or a name given twice.
    """
    settings: dict[str, float | int] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not name or not equals:
            raise InputError(f"--set {pair!r}: write name=number, for example --set cfg=2")
        try:
            value = int(text) if text.lstrip("+-").isdecimal() else float(text)
        except ValueError:
            raise InputError(f"--set {pair!r}: {text!r} is not a number") from None
        if name in settings:
            raise InputError(f"--set {name}: given twice")
        settings[name] = value
    return settings


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def check_pair(inception: Path | None, reference: list[Path] | None) -> None:
    """Nothing, where both or neither are given.

    Raises:
        InputError: one without the other.
    """
    if inception is not None and not reference:
        raise InputError("--inception needs --reference: .npz with mu and sigma, or real images")
    if reference and inception is None:
        raise InputError("--reference needs --inception, the weights of the network that looks at the images")
