"""What `--method` may say: an algorithm, a smoother before it, or both joined by a plus.

A smoother alone brings the rounding that its paper uses: AWQ searches clipped scales, SmoothQuant rounds to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

from qexport.algorithms import ALGORITHMS, SMOOTHERS
from qexport.errors import InputError
from qexport.suggest import nearest

AUTO = "auto"
"""Mixed precision: formats are chosen layer by layer (`qexport.auto`)."""

AUTO_ALGORITHM = "gptq"

_OWN_ROUNDING = {"awq": "mse", "smoothquant": "rtn"}

METHODS = (*ALGORITHMS, *SMOOTHERS, *(f"{smoother}+gptq" for smoother in SMOOTHERS))
"""What is worth trying; other combinations of a smoother and an algorithm work too."""


@dataclass(frozen=True)
class Method:
    """An algorithm of `ALGORITHMS`, and a smoother of `SMOOTHERS` or None."""

    name: str
    algorithm: str
    smooth: str | None = None


def parse_method(name: str, besides: tuple[str, ...] = ()) -> Method:
    """The method of that name: ``gptq``, ``awq``, ``smoothquant+gptq`` …

    A refusal lists `besides` too: what the caller takes in place of a method.

    Raises:
        InputError: a part that is unknown, or parts that do not go together.
    """
    first, plus, second = name.partition("+")
    if not plus and first in ALGORITHMS:
        return Method(name, first)
    if not plus and first in SMOOTHERS:
        return Method(name, _OWN_ROUNDING[first], first)
    if plus and first in SMOOTHERS and second in ALGORITHMS:
        return Method(name, second, first)
    known = (*METHODS, *besides)
    raise InputError(f"unknown method {name!r}{nearest(name, known)}; known are {', '.join(known)}")
