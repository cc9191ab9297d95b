"""What the solver comes upon and goes on from is remarked on, line by line: layers made for it in a tiny VAR."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_shared_aln
from torch import Tensor

from qexport.bundle import Bundle
from qexport.export import export
from qexport.family import Generator
from qexport.formats import get_format
from qexport.pipeline import load_generator
from qexport.recipe import Calibration, Recipe, Rule
from qexport.remarks import Remark, summary
from qexport.scheme import ActivationSpec, PerChannel, PerGroup, PerStep, TensorSpec
from qexport.solution import Solution
from qexport.solve import solve

W4 = TensorSpec(get_format("int4"), PerGroup(32))
W8 = TensorSpec(get_format("int8"), PerChannel())
A8 = ActivationSpec(get_format("int8"))
FC1, FC2, PROJ = "blocks.0.ffn.fc1", "blocks.0.ffn.fc2", "blocks.0.attn.proj"

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[dict[str, Tensor]], object]


def changed(change: Change) -> Generator:
    generator = tiny_shared_aln()
    with torch.no_grad():
        change(generator.graph("step").parameters())
    return generator


def solved(generator: Generator, *rules: Rule, samples: int = 2) -> Solution:
    return solve(generator, Recipe("test", rules, calibration=Calibration(samples)))


def fc1(rows: slice, bias: float) -> Change:
    """Weights of these rows zero: what they hand on to fc2 is GELU(bias), whatever comes in; GELU(0) is 0."""

    def change(parameters: dict[str, Tensor]) -> None:
        parameters[f"{FC1}.weight"][rows] = 0
        parameters[f"{FC1}.bias"][rows] = bias

    return change


def values(rows: slice) -> Change:
    """Attention mixes zeros in these rows of v."""

    def change(parameters: dict[str, Tensor]) -> None:
        parameters["blocks.0.attn.mat_qkv.weight"][128:][rows] = 0
        parameters["blocks.0.attn.v_bias"][rows] = 0

    return change


def nothing(parameters: dict[str, Tensor]) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "rule", "remark"),
    [
        (nothing, Rule("blocks.0.ffn.*", W4, "gptq"), None),
        (fc1(slice(3, 15), 0.0), Rule(FC2, W4, "gptq"), Remark("gptq_zero_channels", FC2, 12, 256)),
        (fc1(slice(3, 15), 1.0), Rule(FC2, W4, "gptq"), Remark("constant_channels", FC2, 12, 256)),
        (fc1(slice(3, 15), 0.0), Rule(FC2, W8, activation=A8), None),  # one scale for all: channels do not matter
        (fc1(slice(None), 0.0), Rule(FC2, W8, activation=A8), Remark("zero_inputs", FC2, 1, 1)),
        (fc1(slice(None), 1.0), Rule(FC2, W8, activation=A8), Remark("constant_inputs", FC2, 1, 1)),
        (
            fc1(slice(None), 0.0),
            Rule(FC2, W8, activation=ActivationSpec(get_format("int8"), PerStep())),
            Remark("zero_inputs", FC2, 3, 3),
        ),
        (values(slice(4, 9)), Rule(PROJ, W4, "mse", "awq"), Remark("smooth_zero_channels", "blocks.0.proj", 5, 64)),
        (
            values(slice(4, 9)),
            Rule(PROJ, W8, "rtn", "smoothquant", A8),
            Remark("smooth_zero_channels", "blocks.0.proj", 5, 64),
        ),
        (
            lambda parameters: parameters[f"{PROJ}.weight"][:, 7].zero_(),
            Rule(PROJ, W8, "rtn", "smoothquant"),
            Remark("smooth_zero_weights", "blocks.0.proj", 1, 64),
        ),
    ],
)
def test_one_remark_for_what_was_made(change: Change, rule: Rule, remark: Remark | None) -> None:
    generator = changed(change)
    solution = solved(generator, rule)
    assert list(solution.remarks) == ([remark] if remark else [])
    for activation in solution.activations.values():
        assert activation.scale is not None
        assert np.isfinite(activation.scale).all()
    if remark and remark.kind == "zero_inputs":
        np.testing.assert_array_equal(solution.activations[FC2].scale, np.ones_like(solution.activations[FC2].scale))


def test_layers_that_nothing_can_smooth() -> None:
    solution = solved(tiny_shared_aln(), Rule("blocks.*", W8, "rtn", "smoothquant"))
    assert {remark.place for remark in solution.remarks if remark.kind == "not_smoothed"} == {
        f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.mat_qkv", "ffn.fc1", "ffn.fc2")
    }  # modulation is shared by the blocks here, so nothing can be folded into it
    assert set(solution.smooth) == {"blocks.0.proj", "blocks.1.proj"}


def test_calls_left_out_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator("dit-c10-d2")
    recipe = Recipe("test", (Rule("blocks.0.mlp.fc1", W4, "gptq"),), calibration=Calibration(4, 0, "ddim-50"))
    recording = import_module("qexport.calibrate.record")  # the package has a function of that name
    monkeypatch.setattr(recording, "WIRE_BYTES", 2 << 20)
    (remark,) = solve(generator, recipe).remarks
    assert (remark.kind, remark.place, remark.of) == ("calls_left_out", "denoise", 50)
    assert 25 < remark.count < 50  # 64 tokens of 96 channels and more, float32, 4 images: 0.1 MB a call at least
    monkeypatch.undo()
    assert not solve(load_generator("dit-c10-d2"), recipe).remarks


def test_a_run_that_goes_on_remembers_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("test", (Rule(FC2, W4, "gptq"),), calibration=Calibration(2))
    want = solve(changed(fc1(slice(3, 15), 0.0)), recipe, work=tmp_path).remarks

    def refuse(*args: object) -> None:
        raise AssertionError("a stage was solved again")

    monkeypatch.setattr(import_module("qexport.solve.solver"), "solve_stage", refuse)
    assert solve(changed(fc1(slice(3, 15), 0.0)), recipe, work=tmp_path).remarks == want != ()


@pytest.mark.slow
def test_zero_weights_and_all_else_stand_in_the_manifest(tmp_path: Path) -> None:
    def change(parameters: dict[str, Tensor]) -> None:
        fc1(slice(3, 15), 0.0)(parameters)
        parameters[f"{PROJ}.weight"][5] = 0

    generator = changed(change)
    recipe = Recipe("test", (Rule(PROJ, W8), Rule("blocks.0.ffn.*", W4, "gptq")), calibration=Calibration(2))
    solution = solve(generator, recipe)
    told: list[Any] = []
    export(generator, recipe, tmp_path / "out", solution=solution, progress=lambda *args: told.append(args))
    manifest = Bundle.open(tmp_path / "out", "full").manifest
    zero, channels = manifest.notes
    assert zero["places"] == {PROJ: [1, 64], FC1: [24, 512]}
    assert zero["text"] == (
        f"2 layers with groups of weights that are all zero ({PROJ}: 1 of 64, …): scale 1, they stay zero"
    )
    assert channels["text"] == (
        f"1 layer with input channels that are always zero in calibration ({FC2}: 12 of 256): "
        "GPTQ leaves their weights to rounding to nearest"
    )
    rows = {row["name"]: row.get("zero_groups") for row in manifest.layers}
    assert (rows[PROJ], rows[FC2]) == ([1, 64], None)


def test_lines_are_in_one_order_and_one_for_each_kind() -> None:
    remarks = [Remark("not_smoothed", "b"), Remark("zero_weights", "a", 1, 2), Remark("not_smoothed", "c")]
    assert [(found["kind"], list(found["places"])) for found in summary(remarks)] == [
        ("zero_weights", ["a"]),
        ("not_smoothed", ["b", "c"]),
    ]
    assert summary([]) == []
