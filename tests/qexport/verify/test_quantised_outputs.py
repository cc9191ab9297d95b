"""Decoders whose convolutions are int8 throughout: both forms pass the ladder, load anywhere, and damage is found."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from damage import Sign, climb, failure
from hand_made import solution_for

from qexport.bundle import Bundle
from qexport.export import export
from qexport.family import Effort, Generator, find_model
from qexport.formats import get_format
from qexport.lower import lower
from qexport.recipe import Recipe, Rule
from qexport.request import decoder_scheme
from qexport.runtime import load
from qexport.scheme import ActivationSpec
from qexport.targets.fusion import integer_convolution
from qexport.verify import Check, VerifyReport, verify
from qexport.verify.activation_checks import OUTPUTS
from qexport.verify.integer_convolutions import NAME as INTEGERS
from qexport.verify.placement import surprises
from qexport.verify.rungs import Climb, find_models
from qexport.verify.rungs.trajectories import check_integers

SCHEME = decoder_scheme(8, 8)
TARGET = "ort-cpu"
LAYER = "decoder.mid.block_1.conv1"


def recipe() -> Recipe:
    assert SCHEME is not None
    return Recipe("decoder", (Rule("decode/*", SCHEME.weight, activation=SCHEME.activation),))


def write(generator: Generator, out: Path) -> Bundle:
    bundle = export(
        generator, recipe(), out, solution=solution_for(generator, recipe()), progress=lambda stage, done, total: None
    )
    lower(bundle.path, TARGET)
    return Bundle.open(out)


@pytest.fixture(scope="module")
def integers(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """var-c10-d2 with an int8 decoder, portable and lowered; not to be written to."""
    return write(generator, tmp_path_factory.mktemp("outputs") / "bundle").path


@pytest.fixture
def damaged(integers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(integers, tmp_path / "damaged"))


def check(root: Path, generator: Generator, target: str | None) -> VerifyReport:
    return verify(
        root, generator=generator, provider="cpu", samples=1, batch=1, speed=False, reports=False, target=target
    )


def convolutions(root: Path) -> list[str]:
    """Layers that are int8 throughout, by name."""
    return [str(row["name"]) for row in Bundle.open(root).manifest.layers if integer_convolution(row)]


@pytest.mark.slow
def test_portable_and_lowered_pass(integers: Path, generator: Generator) -> None:
    wanted = convolutions(integers)
    assert len(wanted) > 30
    for target in (None, TARGET):
        report = check(integers, generator, target)
        assert report.passed, [(found.name, found.detail) for found in report.failures]
        assert report.quality["decoder_psnr_db"] > 35
        layers = report.placement["serve"]["decode"]["layers"]
        found = [name for name in wanted if layers[name] == "QLinearConv"]
        assert found == (wanted if target else [])
        assert (INTEGERS in [one.name for one in report.checks]) == bool(target)


def assert_loads_by_default(root: Path) -> None:
    """Every graph under ONNX Runtime's own options, without those of qexport, makes the same pictures."""
    backends = {target: load(root, "cpu", "exact", target=target).player.backend for target in (None, TARGET)}
    bundle = Bundle.open(root)
    for target, backend in backends.items():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # External data is relative to the bundle, of lowered graphs too.
        at_root = root / f"default-{target}.onnx"
        at_root.write_bytes(bundle.graph_files(target)["decode"].read_bytes())
        session = onnxruntime.InferenceSession(str(at_root), options, providers=["CPUExecutionProvider"])
        (port,) = session.get_inputs()
        shape = [size if isinstance(size, int) else 1 for size in port.shape]
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        (image,) = (np.asarray(value) for value in session.run(None, {port.name: x}))
        (name,) = backend.outputs("decode")
        ours = backend.get(backend.run("decode", {port.name: backend.put(x)}, (name,))[name])
        assert float(np.sqrt(np.mean((image - ours) ** 2))) < 0.02  # codes flip where sums are ordered otherwise


def test_graphs_load_at_the_default_level(damaged: Path) -> None:
    assert_loads_by_default(damaged)


@pytest.mark.slow
def test_graphs_of_a_kl_autoencoder_load_at_the_default_level(tmp_path: Path) -> None:
    family, entry = find_model("dit-c10-d2")
    bundle = write(family.load(entry, None, None), tmp_path / "bundle")
    graph = onnx.load(str(bundle.graph_files(TARGET)["decode"]), load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    # Of 21: the picture's stays; the first, of four channels, is rounded as the next one's input, and taken along.
    assert (counts["QLinearConv"], counts["Conv"]) == (20, 1)
    assert len(convolutions(bundle.path)) == 19
    assert_loads_by_default(bundle.path)


def edit(file: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(str(file), load_external_data=False)
    change(model.graph)
    onnx.save(model, str(file))


def doubled(suffix: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        tensor = next(tensor for tensor in graph.initializer if tensor.name == f"{LAYER}{suffix}")
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 2, tensor.name))

    return change


def unrounded(graph: onnx.GraphProto) -> None:
    """The pair behind one convolution is taken out."""
    restored = next(node for node in graph.node if node.name == f"{LAYER}.output/DequantizeLinear")
    convolution = next(node for node in graph.node if node.op_type == "Conv" and node.name.startswith(LAYER))
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == restored.output[0]:
                node.input[place] = convolution.output[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [(doubled(".out_scale"), "its scale is"), (unrounded, "its output is not quantised")],
    ids=["scale", "missing"],
)
def test_damaged_outputs_are_named(
    change: Callable[[onnx.GraphProto], None], words: str, damaged: Path, generator: Generator, sign_again: Sign
) -> None:
    edit(damaged / "decode.onnx", change)
    sign_again(damaged)
    found = failure(climb(damaged, generator), OUTPUTS)
    assert words in found.detail
    assert (found.value, found.place.node) == (1, f"decode/{LAYER}")


def integer_check(root: Path, generator: Generator) -> Check:
    """The rung "integer convolutions" alone."""
    report = VerifyReport(str(root))
    one = Climb(
        Bundle.open(root), "cpu", report, lambda stage, done, total: None, batch=2, seed=0, target=TARGET,
        effort=Effort(2),
    )  # fmt: skip
    models = find_models(one, generator, None, None)
    assert models is not None
    check_integers(one, models, TARGET)
    (found,) = report.checks
    return found


def test_a_wrong_bias_of_an_integer_convolution_is_named(damaged: Path, generator: Generator, sign_again: Sign) -> None:
    sound = integer_check(damaged, generator)
    assert sound.passed
    assert sound.value > 0.9  # numbers next to a border use nearly all of the bound
    file = damaged / "targets" / TARGET / "decode.onnx"
    name = next(
        node.input[8]
        for node in onnx.load(str(file), load_external_data=False).graph.node
        if node.op_type == "QLinearConv" and node.input[3] == f"{LAYER}.weight"
    )
    edit(file, doubled(name.removeprefix(LAYER)))
    sign_again(damaged)
    found = integer_check(damaged, generator)
    assert (found.passed, found.place.node) == (False, f"decode/{LAYER}")
    assert found.value > 1.5


def test_a_convolution_that_stayed_floating_point_is_a_surprise() -> None:
    row = {
        "name": "decode/conv", "graph": "decode", "shape": [16, 8, 3, 3], "algorithm": "rtn", "format": "int8",
        "activation_format": "int8", "activation_scales": "static", "output_format": "int8",
    }  # fmt: skip
    assert surprises([row], {"decode/conv": "QLinearConv"}, "cpu", TARGET) == []
    (found,) = surprises([row], {"decode/conv": "Conv"}, "cpu", TARGET)
    assert found == ("decode/conv", "not an integer convolution: Conv")
    assert surprises([row], {"decode/conv": "Conv"}, "cpu", None) == []  # portable graphs are not expected to be
    assert surprises([{**row, "output_format": None}], {"decode/conv": "Conv"}, "cpu", TARGET) == []


def test_older_bundles_round_inputs_alone(generator: Generator) -> None:
    """A recipe without the key: no outputs, and the layer's row does not speak of them."""
    old = Recipe("old", (Rule("decode/*", recipe().rules[0].weight, activation=ActivationSpec(get_format("int8"))),))
    assert not solution_for(generator, old).outputs
    assert solution_for(generator, recipe()).outputs
