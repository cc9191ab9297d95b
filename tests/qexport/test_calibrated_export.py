"""What a solution must be for a recipe, and what is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qexport.bundle.calibration import calibration_bytes, read_calibration
from qexport.errors import BundleError, InputError
from qexport.export import export
from qexport.family import Generator, find_model
from qexport.formats import get_format
from qexport.graph.step_scales import with_step_scales
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import assign_rules, places_of, require_exportable, stored_weights
from qexport.recipe import Recipe, Rule
from qexport.scheme import ActivationSpec, PerChannel, PerGroup, PerStep, PerToken, TensorSpec
from qexport.solution import Activation, Solution

INT8 = TensorSpec(get_format("int8"), PerChannel())
A8 = ActivationSpec(get_format("int8"))
LAYER = "blocks.0.ffn.fc1"


@pytest.fixture(scope="module")
def var() -> Generator:
    family, entry = find_model("var-c10-d2")
    return family.load(entry, None, None)


@pytest.fixture(scope="module")
def dit() -> Generator:
    family, entry = find_model("dit-c10-d2")
    return family.load(entry, None, None)


def recipe(*rules: Rule) -> Recipe:
    return Recipe("test", rules)


def test_a_star_does_not_reach_into_the_decoder(var):
    assert set(assign_rules(var, recipe(Rule("*", INT8)))) == set(var.layers)
    both = assign_rules(var, recipe(Rule("decode/decoder.conv_*", INT8), Rule("*", INT8)))
    assert set(both) - set(var.layers) == {"decode/decoder.conv_in", "decode/decoder.conv_out"}
    assert places_of(var, both)["decode/decoder.conv_in"] == ("decode", "decoder.conv_in.weight")


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule("decode/*", TensorSpec(get_format("int4"), PerGroup(8))), "per channel or per tensor"),
        (Rule("decode/*", INT8, activation=ActivationSpec(get_format("int8"), PerToken())), "no tokens"),
        (
            Rule("decode/*", INT8, activation=ActivationSpec(get_format("int8"), PerStep())),
            "no steps in graph 'decode'",
        ),
        (Rule("decode/decodr.*", INT8), "did you mean"),
    ],
)
def test_what_a_decoder_cannot_have(var, rule, says):
    with pytest.raises(InputError, match=says):
        assign_rules(var, recipe(rule))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Rule("blocks.*", TensorSpec(get_format("fp4-e2m1"), PerChannel())), "fp4-e2m1 is for study only"),
        (
            Rule("blocks.*", INT8, activation=ActivationSpec(get_format("int6"))),
            "activations in int6 cannot be exported",
        ),
        (Rule("blocks.*", INT8, activation=A8), "in the solution"),
        *(
            (Rule(LAYER, TensorSpec(get_format(name), PerGroup(32)), activation=spec), f"{name}.*--act-scales token")
            for name in ("int8", "int6")
            for spec in (A8, replace(A8, scales=PerStep()), replace(A8, symmetric=False))
        ),
    ],
)
def test_refused_before_anything_is_written(var, rule, says, tmp_path: Path):
    with pytest.raises(InputError, match=says):
        export(var, recipe(rule), tmp_path / "out", progress=lambda stage, done, total: None)
    assert list(tmp_path.iterdir()) == []


def test_groups_that_run_are_not_refused(var):
    grouped = TensorSpec(get_format("int8"), PerGroup(32))
    for activation in (None, ActivationSpec(get_format("int8"), PerToken()), ActivationSpec(get_format("fp8-e4m3"))):
        require_exportable({LAYER: Rule(LAYER, grouped, activation=activation)})
    require_exportable({LAYER: Rule(LAYER, TensorSpec(get_format("int4"), PerGroup(32)), activation=A8)})


def test_codes_of_a_solution_are_taken_and_those_of_another_weight_are_not(var):
    graph, name = var.layers[LAYER]
    shape = tuple(var.graph(graph).parameters()[name].shape)
    codes = np.ones(shape, np.int8)
    scales = np.full((shape[0], 1), 0.5, np.float16)
    plan = recipe(Rule(LAYER, INT8))
    found = {w.name: w for w in stored_weights(var, plan, Solution({LAYER: QuantizedTensor(codes, scales, INT8)}))}
    value = found[name].value
    assert isinstance(value, QuantizedTensor)
    assert value.codes is codes
    other = QuantizedTensor(codes[:, :-1].copy(), scales, INT8)
    with pytest.raises(InputError, match="was solved as"):
        list(stored_weights(var, plan, Solution({LAYER: other})))


def test_scales_of_the_step_lie_in_the_rows_of_every_schedule(dit):
    spec = ActivationSpec(get_format("int8"), PerStep())
    scale = np.arange(1, 11, dtype=np.float32)
    layers = ("blocks.1.mlp.fc1", "blocks.0.mlp.fc1")
    plan, tables = with_step_scales(dit, {layers[0]: Activation(spec, scale), layers[1]: Activation(spec, scale * 100)})
    short = tables["schedule.ddim-10.act_scale"]
    # Ten steps from the noisiest timestep down, in ten stretches of timesteps; the model's order of layers, not ours.
    np.testing.assert_array_equal(short[:, 1], scale[::-1])
    np.testing.assert_array_equal(short[:, 0], scale[::-1] * 100)
    assert plan.tables["schedule.ddpm-250.act_scale"].shape == (250, 2)
    with pytest.raises(InputError, match="one for each of 10 steps"):
        with_step_scales(dit, {layers[0]: Activation(spec, scale[:-1])})
    with pytest.raises(InputError, match="has no steps"):
        with_step_scales(replace(dit, steps=None), {layers[0]: Activation(spec, scale)})


def test_calibration_file_round_trip(tmp_path: Path):
    lopsided = ActivationSpec(get_format("int8"), symmetric=False)
    stepped = ActivationSpec(get_format("int4"), PerStep())
    token = ActivationSpec(get_format("fp8-e4m3"), PerToken())
    specs = {"a": lopsided, "b": stepped, "c": token}
    activations = {
        "a": Activation(lopsided, np.array(0.25, np.float32), -17),
        "b": Activation(stepped, np.array([1, 2, 3], np.float32)),
        "c": Activation(token, None),
    }
    factor = np.array([0.5, 2], np.float32)
    output = Activation(A8, np.array(0.5, np.float32))
    data = calibration_bytes(Solution({}, {"fold": factor}, activations, outputs={"a": output}))
    (tmp_path / "calibration.safetensors").write_bytes(data)
    rules = {layer: Rule(layer, INT8, activation=spec) for layer, spec in specs.items()}
    solution = read_calibration(tmp_path, rules, {"a": A8})
    found = solution.activations
    np.testing.assert_array_equal(solution.smooth["fold"], factor)
    assert [(layer, float(v.scale)) for layer, v in solution.outputs.items() if v.scale is not None] == [("a", 0.5)]
    assert [(v.spec, v.zero_point) for v in found.values()] == [(lopsided, -17), (stepped, 0), (token, 0)]
    assert calibration_bytes(solution) == data
    with pytest.raises(BundleError, match="no scale of the output of 'b'"):
        read_calibration(tmp_path, rules, {"a": A8, "b": A8})
    with pytest.raises(BundleError, match="no use for"):
        read_calibration(tmp_path, rules)
    with pytest.raises(BundleError, match="no use for"):
        read_calibration(tmp_path, {"a": rules["a"]})
    with pytest.raises(BundleError, match="no activation scale of 'd'"):
        read_calibration(tmp_path, {**rules, "d": Rule("d", INT8, activation=A8)})
    assert calibration_bytes(Solution()) == b""
