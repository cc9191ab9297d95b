"""Bundles with quantised inputs of layers: every kind passes the ladder, and damage is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from damage import Sign, climb, failure
from hand_made import solution_for

from qexport.bundle import Bundle
from qexport.bundle.calibration import CALIBRATION, calibration_bytes, read_calibration
from qexport.export import export
from qexport.family import Generator, find_model
from qexport.formats import get_format
from qexport.quantize import assign_rules
from qexport.recipe import Recipe, Rule, recipe_for
from qexport.recipe_toml import read_recipe
from qexport.scheme import ActivationSpec, PerChannel, PerStep, TensorSpec, preset
from qexport.solution import Solution
from qexport.verify import VerifyReport, verify

LAYER = "blocks.1.ffn.fc2"
DECODER_LAYER = "decode/decoder.up.0.block.0.conv1"
INT8 = TensorSpec(get_format("int8"), PerChannel())
A8 = ActivationSpec(get_format("int8"))


def check(root: Path, generator: Generator) -> VerifyReport:
    return verify(root, generator=generator, provider="cpu", samples=2, batch=2, speed=False, reports=False)


def write(generator: Generator, recipe: Recipe, out: Path) -> Bundle:
    solution = solution_for(generator, recipe)
    return export(generator, recipe, out, solution=solution, progress=lambda stage, done, total: None)


def schemes() -> list[Recipe]:
    found = []
    for arguments in (
        (8, 8, "int", "static"),
        (8, 8, "fp8", "static"),
        (8, 8, "int", "token"),
        (4, 8, "int", "static"),
        (2, 8, "int", "static"),
    ):
        wbits, abits, number_format, scales = arguments
        scheme = preset(wbits, abits, number_format=number_format, activation_scales=scales)
        found.append(recipe_for(scheme, ("blocks.*",), scheme.name))
    lopsided = ActivationSpec(get_format("int8"), symmetric=False)
    found.append(Recipe("asymmetric", (Rule("blocks.*", INT8, activation=lopsided),)))
    found.append(Recipe("decoder", (Rule("decode/*", INT8),)))
    found.append(Recipe("beside", (Rule("*.fc2", INT8), Rule("blocks.*", INT8, activation=A8))))
    mixed = (Rule("blocks.*", INT8, activation=ActivationSpec(get_format("int8"), PerStep())),)
    found.append(Recipe("mixed", (*mixed, Rule("head", preset(4).weight), Rule("decode/*", INT8, activation=A8))))
    return found


@pytest.fixture(scope="module")
def mixed(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scales of the step in the blocks, a weight-only head, an int8 decoder with static activations."""
    return write(generator, schemes()[-1], tmp_path_factory.mktemp("mixed") / "bundle").path


@pytest.fixture(scope="module")
def static(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(generator, schemes()[0], tmp_path_factory.mktemp("static") / "bundle").path


@pytest.fixture
def damaged(static: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(static, tmp_path / "damaged"))


@pytest.mark.parametrize("recipe", schemes()[1:-1], ids=lambda recipe: recipe.name)
@pytest.mark.slow
def test_every_kind_passes(recipe: Recipe, generator: Generator, tmp_path: Path) -> None:
    bundle = write(generator, recipe, tmp_path / "bundle")
    report = check(bundle.path, generator)
    assert report.passed, [(found.name, found.detail) for found in report.failures]
    assert not report.skipped
    assert ("decoder_psnr_db" in report.quality) == (recipe.name == "decoder")


def test_scales_of_the_step_a_head_and_a_decoder_together(mixed: Path, generator: Generator) -> None:
    report = check(mixed, generator)
    assert report.passed, [(found.name, found.detail) for found in report.failures]
    assert report.quality["decoder_psnr_db"] > 35
    row = next(row for row in Bundle.open(mixed).manifest.layers if row["name"] == DECODER_LAYER)
    assert (row["activation_format"], row["activation_scales"], len(row["shape"])) == ("int8", "static", 4)


def test_static_int8_is_fused_and_its_file_is_read_back(static: Path, generator: Generator) -> None:
    report = check(static, generator)
    assert report.passed, [(found.name, found.detail) for found in report.failures]
    assert set(report.placement["serve"]["step"]["layers"].values()) == {"MatMulIntegerToFloat"}
    recipe = read_recipe(static / "recipe.toml")
    assert (
        calibration_bytes(read_calibration(static, assign_rules(generator, recipe)))
        == (static / CALIBRATION).read_bytes()
    )


def edit(root: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    path = root / "step.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model.graph)
    onnx.save(model, str(path))


def constant(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def test_one_activation_scale_doubled(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    def change(graph: onnx.GraphProto) -> None:
        scale = constant(graph, f"{LAYER}.act_scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 2, scale.name))

    edit(damaged, change)
    sign_again(damaged)
    report = climb(damaged, generator, operators=True)
    assert str(failure(report, "quantised inputs that differ").place) == f"step/{LAYER}"
    operators = failure(report, "quantised operators: relative L2 against float64")
    assert (operators.place.graph, operators.place.node) == ("step", LAYER)


def test_zero_point_off_by_one(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    def change(graph: onnx.GraphProto) -> None:
        zero = constant(graph, f"{LAYER}.act_zero_point")
        zero.CopyFrom(onnx.numpy_helper.from_array(np.array(1, np.int8), zero.name))

    edit(damaged, change)
    sign_again(damaged)
    found = failure(climb(damaged, generator), "quantised inputs that differ")
    assert (str(found.place), found.detail) == (f"step/{LAYER}", "its zero point is 1, not 0")


def test_quantiser_left_out(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    def change(graph: onnx.GraphProto) -> None:
        nodes = {node.name: node for node in graph.node}
        nodes[LAYER].input[0] = nodes[f"{LAYER}.input/QuantizeLinear"].input[0]
        for name in ("QuantizeLinear", "DequantizeLinear"):
            graph.node.remove(nodes[f"{LAYER}.input/{name}"])

    edit(damaged, change)
    sign_again(damaged)
    report = climb(damaged, generator)
    found = failure(report, "layers not quantised")
    assert (str(found.place), found.detail) == (f"step/{LAYER}", "its input is not quantised")


def test_zero_points_of_a_weight(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    def change(graph: onnx.GraphProto) -> None:
        zeros = constant(graph, f"{LAYER}.weight_zero_point")
        zeros.CopyFrom(onnx.numpy_helper.from_array(np.ones(zeros.dims[0], np.int8), zeros.name))

    edit(damaged, change)
    sign_again(damaged)
    report = climb(damaged, generator)
    assert failure(report, "quantised weights that differ").place.node == LAYER


def test_scales_of_the_step_shifted_by_one(mixed: Path, generator: Generator, sign_again: Sign, tmp_path: Path) -> None:
    root = Path(shutil.copytree(mixed, tmp_path / "damaged"))
    bundle = Bundle.open(root)
    data = bytearray((root / "weights.data").read_bytes())
    tables = [bundle.plan.tables[f"act_scale.{step}"] for step in range(7)]
    pieces = [bytes(data[t.offset : t.offset + t.nbytes]) for t in tables]
    for table, piece in zip(tables, pieces[1:] + pieces[:1], strict=True):
        data[table.offset : table.offset + table.nbytes] = piece
    (root / "weights.data").write_bytes(data)
    sign_again(root)
    assert failure(climb(root, generator), "sampling plan: parts that differ").place.node == "table act_scale.0"


@pytest.mark.slow
def test_scales_of_the_step_through_a_schedule(tmp_path: Path) -> None:
    """The tables of a schedule's scales are taken along with it."""
    family, entry = find_model("dit-c10-d2")
    dit = family.load(entry, None, None)
    scheme = preset(8, 8, activation_scales="step")
    bundle = write(dit, recipe_for(scheme, dit.default_layers, scheme.name), tmp_path / "bundle")
    assert bundle.plan.with_schedule("ddim-10").calls[0].inputs["act_scale"] == "row.schedule.ddim-10.act_scale"
    report = verify(
        bundle.path, generator=dit, provider="cpu", samples=2, schedule="ddim-10", speed=False, reports=False
    )
    assert report.passed, [(found.name, found.detail) for found in report.failures]
    assert 0 < report.quality["output_mse"] < 0.01


@pytest.mark.parametrize("damage", ["less", "cut", "more"])
def test_calibration_file_damaged(
    damage: str, static: Path, generator: Generator, sign_again: Sign, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(static, tmp_path / "damaged"))
    path = root / CALIBRATION
    if damage == "less":
        found = read_calibration(static, assign_rules(generator, read_recipe(root / "recipe.toml")))
        rest = {layer: activation for layer, activation in found.activations.items() if layer != LAYER}
        path.write_bytes(calibration_bytes(replace(found, activations=rest)))
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_bytes(calibration_bytes(Solution({}, {"blocks.0.qkv": np.ones(128, np.float32)}, {})))
    sign_again(root)
    found = failure(climb(root, generator), "calibration")
    assert (found.place.node, "\n" in found.detail) == (CALIBRATION, False)
