"""Everything that can be exported passes the whole ladder on a CPU: every format, activation and method; a tiny VAR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_shared_aln

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.export import export
from qexport.family import Generator
from qexport.formats import FORMATS, get_format
from qexport.methods import METHODS, parse_method
from qexport.quantize import EXPORTED_INPUTS, require_exportable
from qexport.recipe import Calibration, Recipe, Rule
from qexport.scheme import (
    ACTIVATION_SCALES,
    ActivationSpec,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
)
from qexport.solve import solve
from qexport.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EXPORTED = [name for name, found in FORMATS.items() if found.onnx_type is not None]
"""Weights; the rest is for study in torch."""


def weight(name: str, granularity: Granularity | None = None) -> TensorSpec:
    number_format = get_format(name)
    return TensorSpec(number_format, granularity or (PerChannel() if number_format.bits == 8 else PerGroup(32)))


def activation(name: str, scales: str = "static", symmetric: bool = True) -> ActivationSpec:
    return ActivationSpec(get_format(name), ACTIVATION_SCALES[scales], symmetric)


def schemes() -> dict[str, tuple[Rule, ...]]:
    blocks, decoder = "blocks.*", "decode/*"
    found: dict[str, tuple[Rule, ...]] = {"w16a16": ()}
    for name in EXPORTED:
        found[f"weights {name}"] = (Rule(blocks, weight(name), "ternary" if name == "ternary" else "rtn"),)
    for granularity in (PerGroup(64), PerChannel(), PerTensor()):
        found[f"weights int4 {granularity}"] = (Rule(blocks, weight("int4", granularity)),)
    for name in EXPORTED_INPUTS:
        partner = name if get_format(name).bits == 8 else "int8"
        for scales in ACTIVATION_SCALES:
            found[f"{partner} × {name} {scales}"] = (
                Rule(blocks, weight(partner), activation=activation(name, scales)),
            )
    found["int8 × int8 zero point"] = (Rule(blocks, weight("int8"), activation=activation("int8", symmetric=False)),)
    for scales in ("static", "token"):
        found[f"int4 × int8 {scales}"] = (Rule(blocks, weight("int4"), activation=activation("int8", scales)),)
    for name in METHODS:
        method = parse_method(name)
        spec = weight("int2" if name == "ternary" else "int4")
        found[f"method {name}"] = (Rule(blocks, spec, method.algorithm, method.smooth),)
        if method.smooth:
            rule = Rule(blocks, weight("int8"), method.algorithm, method.smooth, activation("int8"))
            found[f"method {name} × int8"] = (rule,)
    found["decoder int8"] = (Rule(decoder, weight("int8")),)
    found["decoder int8 × int8"] = (Rule(decoder, weight("int8"), activation=activation("int8")),)
    return found


@pytest.fixture(scope="module")
def generator() -> Generator:
    """One model for all."""
    return tiny_shared_aln()


def write(generator: Generator, rules: tuple[Rule, ...], out: Path) -> Bundle:
    """The bundle; the generator is as it was afterwards (smoothing is folded into it meanwhile)."""
    recipe = Recipe("test", rules, calibration=Calibration(2))
    parameters = [value for spec in generator.graphs for value in spec.parameters().values()]
    before = [value.clone() for value in parameters]
    try:
        solution = solve(generator, recipe)
        return export(generator, recipe, out, solution=solution, progress=lambda stage, done, total: None)
    finally:
        with torch.no_grad():
            for value, old in zip(parameters, before, strict=True):
                value.copy_(old)


@pytest.mark.parametrize("name", schemes())
def test_it_passes_every_rung(name: str, generator: Generator, tmp_path: Path) -> None:
    rules = schemes()[name]
    bundle = write(generator, rules, tmp_path / "bundle")
    report = verify(bundle.path, generator=generator, provider="cpu", samples=1, batch=1, speed=False, reports=False)
    assert report.passed, [(check.name, check.value, check.limit, check.detail) for check in report.failures]
    assert not report.skipped
    names = {check.name for check in report.checks}
    assert {"integrity", "step logits: relative L2", "decode image: largest difference"} <= names
    assert bool(rules) == (bundle.manifest.totals["layers_quantized"] > 0)


def test_the_list_is_complete() -> None:
    """A format or a method that is added is climbed too; those that are refused are the study formats alone."""
    rules = {rule for found in schemes().values() for rule in found}
    assert {rule.weight.format.name for rule in rules if rule.weight} == set(EXPORTED)
    for name, number_format in FORMATS.items():
        per_channel = TensorSpec(number_format, PerChannel())
        assert exportable(Rule("x", per_channel)) == (name in EXPORTED), name
        as_input = Rule("x", weight("int8"), activation=ActivationSpec(number_format))
        assert exportable(as_input) == (name in EXPORTED_INPUTS), name


def exportable(rule: Rule) -> bool:
    try:
        require_exportable({"x": rule})
    except InputError:
        return False
    return True
