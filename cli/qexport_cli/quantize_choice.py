"""What the options of `qexport quantize` mean together; contradictions are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import InputError
from qexport.suggest import nearest
from qexport_cli.quantize_train import TOPKLD, training_of

if TYPE_CHECKING:
    from qexport.recipe import Recipe
    from qexport.request import Budget, Request
    from qexport.training import Training

DEFAULT_WBITS = 4
DEFAULT_ABITS = 16
FP8_WBITS = 8
FORMATS = ("int", "fp8", "fp8-e5m2")
STUDY_FORMATS = ("fp6", "fp4")
_AUTO_ONLY = ("--target-bits", "--target-bytes")
_SAMPLES = "--calibration-samples"
_NEEDS_WEIGHTS = ("--format", "--method", "--compare", "--act-scales")


@dataclass(frozen=True)
class Choice:
    """One of `request` and `recipe` is set."""

    request: Request | None
    recipe: Recipe | None
    training: Training | None = None


def choose(options: Mapping[str, Any], recipe: Path | None, taught: Mapping[str, Any] | None = None) -> Choice:
    """The request that the options stand for (by their names; None is not given), or the recipe from its file.

    `taught` are ``--topkld`` and what belongs to it.

    Raises:
        InputError: a value that is unknown, or options that contradict each other.
    """
    given = {option: value for option, value in options.items() if value is not None}
    asked = {option: value for option, value in (taught or {}).items() if value is not None}
    if asked and TOPKLD not in asked:
        raise InputError(f"{next(iter(asked))} belongs to {TOPKLD}, which fine-tunes; add {TOPKLD} or leave it out")
    if asked and given.get("--wbits") == 16:
        raise InputError(f"{TOPKLD} has no meaning with --wbits 16, which keeps floating point")
    if recipe is not None:
        from qexport.recipe_toml import read_recipe

        if given:
            option = next(iter(given))
            raise InputError(f"--recipe says what {option} says, for each layer; leave {option} out, or edit {recipe}")
        read = read_recipe(recipe)
        return Choice(None, read, training_of(asked, read.calibration.seed))
    training = training_of(asked, given.get("--seed", 0))
    return Choice(_request(given, training is not None), None, training)


def _request(given: Mapping[str, Any], trained: bool) -> Request:
    number_format = _number_format(given.get("--format", FORMATS[0]))
    wbits = given.get("--wbits", FP8_WBITS if number_format.startswith("fp8") else DEFAULT_WBITS)
    for option in _NEEDS_WEIGHTS:
        if wbits == 16 and option in given:
            raise InputError(f"{option} {given[option]} has no meaning with --wbits 16, which keeps floating point")
    if "--act-scales" in given and given.get("--abits", DEFAULT_ABITS) == 16:
        raise InputError("--act-scales has no meaning with --abits 16, which keeps floating point; add --abits 8")

    from qexport.methods import AUTO, AUTO_ALGORITHM, parse_method
    from qexport.request import DEFAULT_METHOD, TRAINED_FROM, Request, decoder_scheme
    from qexport.scheme import preset

    name = given.get("--method", (TRAINED_FROM if trained else DEFAULT_METHOD).name)
    auto = name == AUTO
    budget = _budget(given, auto)
    method = parse_method(AUTO_ALGORITHM if auto else name, besides=(AUTO,))
    scheme = preset(
        wbits,
        given.get("--abits", DEFAULT_ABITS),
        given.get("--group-size"),
        number_format,
        given.get("--act-scales", "static"),
    )
    request = Request(
        scheme,
        method,
        samples=given.get(_SAMPLES),
        seed=given.get("--seed", 0),
        decoder=decoder_scheme(given.get("--decoder-wbits", 16), given.get("--decoder-abits", 16)),
        compare=_compared(given),
        budget=budget,
    )
    if _SAMPLES in given and not _looks_at_inputs(request):
        raise InputError(
            f"{_SAMPLES} has no meaning here: {request.name} looks at no inputs; leave it out, or choose a --method "
            "that does, such as gptq, or --abits 8"
        )
    return request


def _looks_at_inputs(request: Request) -> bool:
    """Whether anything is calibrated, as far as can be told before the layers are known."""
    from qexport.recipe import Rule
    from qexport.solve.needs import needs_inputs

    if request.budget is not None:
        return True  # by `AUTO_ALGORITHM`
    scheme, decoder = request.scheme, request.decoder
    methods = request.compare or (request.method,)
    rules = [Rule("*", scheme.weight, m.algorithm, m.smooth, scheme.activation) for m in methods if scheme.weight]
    if decoder is not None:
        rules.append(Rule("*", decoder.weight, activation=decoder.activation))
    return any(needs_inputs(rule) for rule in rules)


def _number_format(name: str) -> str:
    if name in STUDY_FORMATS:
        raise InputError(
            f"--format {name} is for study: ONNX Runtime has no kernel for it, so no bundle is written; "
            f"benchmarks/ptq_quality.py measures it in torch. Use {', '.join(FORMATS)}"
        )
    if name not in FORMATS:
        known = (*FORMATS, *STUDY_FORMATS)
        raise InputError(f"--format {name!r} is unknown{nearest(name, known)}; use {', '.join(FORMATS)}")
    return name


def _budget(given: Mapping[str, Any], auto: bool) -> Budget | None:
    from qexport.request import Budget

    if not auto:
        for option in _AUTO_ONLY:
            if option in given:
                raise InputError(f"{option} needs --method auto, which chooses formats layer by layer")
        return None
    for option in ("--wbits", "--group-size", "--format", "--compare"):
        if option in given:
            raise InputError(f"--method auto chooses formats itself; leave {option} out")
    return Budget(given.get("--target-bits"), given.get("--target-bytes"))


def _compared(given: Mapping[str, Any]) -> tuple[Any, ...]:
    from qexport.methods import AUTO, parse_method

    if "--compare" not in given:
        return ()
    if "--method" in given:
        raise InputError("--compare takes the best of its methods; leave --method out")
    names = [name.strip() for name in given["--compare"].split(",") if name.strip()]
    if AUTO in names:
        raise InputError("--compare tries methods on one scheme; it does not go with auto")
    if not names:
        raise InputError("--compare names no method; write --compare rtn,gptq,awq")
    return tuple(parse_method(name) for name in dict.fromkeys(names))
