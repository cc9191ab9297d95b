"""What ``--topkld`` and the options that belong to it ask of training; settings without an option are ``--train``'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from qexport.errors import InputError
from qexport.suggest import nearest

if TYPE_CHECKING:
    from qexport.training import Training

TOPKLD, TRAIN = "--topkld", "--train"
_OWN_OPTION = {
    "loss": "--variant", "variant": "--variant", "top_k": "--top-k", "steps": "--steps", "batch": "--batch",
    "lr": "--lr", "seed": "--seed", "data": "--data",
}  # fmt: skip
"""What has an option of its own, by the name that one might give it with ``--train``."""

_BOOST = "boost"
_TRUTH = {"true": True, "false": False}


def training_of(asked: Mapping[str, Any], seed: int) -> Training | None:
    """What is asked of training by options (by their names; those not given are not there); None without any.

    Raises:
        InputError: a value that is unknown, or options that contradict each other.
    """
    if not asked:
        return None
    from qexport.distill import LOSSES, TOPK_LOSSES, Distillation, DistillSettings
    from qexport.training import Training

    loss = asked.get("--variant", Distillation().loss)
    if loss not in LOSSES:
        raise InputError(f"--variant {loss!r} is unknown{nearest(loss, LOSSES)}; one of {', '.join(LOSSES)}")
    if "--top-k" in asked and loss not in TOPK_LOSSES:
        raise InputError(f"--top-k belongs to {', '.join(TOPK_LOSSES)}; leave it out with --variant {loss}")
    for option in ("--top-k", "--steps", "--batch"):
        if asked.get(option, 1) < 1:
            raise InputError(f"{option} {asked[option]}: must be at least 1")
    if not 0 < asked.get("--lr", 1) < float("inf"):
        raise InputError(f"--lr {asked['--lr']}: must be greater than 0, and finite")
    rest = parse_train(asked.get(TRAIN, ()))
    if _BOOST in rest and loss != "boosted":
        raise InputError(f"{TRAIN} {_BOOST} belongs to --variant boosted; leave it out with --variant {loss}")
    if "samples" in rest and "--data" in asked:
        raise InputError(f"{TRAIN} samples counts what the model draws itself; leave it out with --data")
    distillation = Distillation(
        loss, asked.get("--top-k", Distillation().top_k), rest.pop(_BOOST, Distillation().boost)
    )
    settings = {name: asked[f"--{name}"] for name in ("steps", "batch", "lr") if f"--{name}" in asked}
    return Training(
        DistillSettings(distillation, seed=seed, **settings, **rest),
        asked.get("--data"),
        next((option for option in ("--variant", "--top-k") if option in asked), ""),
        asked.get("--device", "cpu"),
    )


def parse_train(pairs: Iterable[str]) -> dict[str, Any]:
    """Settings of training from ``["ema=0.99", "recompute", …]``: a switch may stand alone, for true.

    Raises:
        InputError: an unknown name, one that has an option of its own, one given twice, or a value of the wrong kind.
    """
    known = _known()
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        name = name.replace("-", "_")
        if name in _OWN_OPTION:
            raise InputError(f"{TRAIN} {pair}: has an option of its own, {_OWN_OPTION[name]}")
        if name not in known:
            raise InputError(f"{TRAIN} {name!r} is unknown{nearest(name, known)}; one of {', '.join(known)}")
        if name in found:
            raise InputError(f"{TRAIN} {name}: given twice")
        wanted, read = known[name]
        if not equals and read is _truth:
            found[name] = True
            continue
        try:
            found[name] = read(text)
        except ValueError:
            raise InputError(f"{TRAIN} {name}={text}: {text!r} is not {wanted}") from None
    return found


def _known() -> dict[str, tuple[str, Callable[[str], Any]]]:
    """What a value of each setting is, in words, and how it is read."""
    from qexport.distill import DistillSettings

    hints = {name: kind for name, kind in get_type_hints(DistillSettings).items() if name not in _OWN_OPTION}
    return {name: _KINDS[kind] for name, kind in (hints | {_BOOST: float}).items()}


def _truth(text: str) -> bool:
    if text not in _TRUTH:
        raise ValueError
    return _TRUTH[text]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


_KINDS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", _truth),
    int: ("an integer", int),
    float: ("a number", float),
    float | None: ("a number", float),
    tuple[float, ...] | None: ("a list of numbers such as 1,0.5,2", _numbers),
}
