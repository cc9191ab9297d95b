import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import toy_bundle

from qexport import runtime
from qexport.errors import BundleError, InputError
from qexport.runtime import session
from qexport.runtime.runtime import quant_traits
from qexport.targets import QuantTraits, ort_cpu, ort_cuda, session_config

LABELS = [0, 3, 1, 2, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "toy"
    toy_bundle.write(folder, target=True)
    return folder


@pytest.fixture(scope="module")
def toy(folder):
    return runtime.load(folder, provider="cpu", threads=1)


@pytest.mark.parametrize("options", ["serve", "exact"])
def test_generates_what_was_worked_out_by_hand(folder, options):
    loaded = runtime.load(folder, "cpu", options)
    images = loaded.generate(LABELS, seed=3, first_index=10, gain=0.5)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, toy_bundle.expected(LABELS, 3, 10, 0.5), atol=2e-6)
    assert loaded.provider == "cpu"


def test_an_image_depends_on_seed_number_and_label_alone(toy):
    whole = toy.generate(LABELS, seed=3)
    for batch in (1, 2, 5, 100):
        np.testing.assert_array_equal(toy.generate(LABELS, seed=3, batch=batch), whole)
    np.testing.assert_array_equal(toy.generate(LABELS[3:], seed=3, first_index=3), whole[3:])
    assert np.abs(toy.generate(LABELS, seed=4) - whole).max() > 1e-3


def test_inputs_per_image_are_split(toy):
    shift = np.linspace(0, 0.4, 5)
    images = toy.generate(np.array(LABELS), batch=2, shift=shift)
    expected = [toy_bundle.expected(LABELS, shift=s)[i] for i, s in enumerate(shift)]
    np.testing.assert_allclose(images, expected, atol=2e-6)
    np.testing.assert_array_equal(toy.generate([1, 2], shift=0.25), toy.generate([1, 2], shift=[0.25, 0.25]))


def test_batches_and_progress(toy):
    told = []
    batches = toy.batches(LABELS, batch=2, progress=lambda done, total: told.append((done, total)))
    assert [len(next(batches)), told[-1]] == [2, (6, 18)]
    assert [len(b) for b in batches] == [2, 1]
    assert told == [(i + 1, 18) for i in range(18)]


def test_target_graphs_reach_the_shared_weights(folder, toy):
    lowered = runtime.load(folder, "cpu", target="toy")
    np.testing.assert_array_equal(lowered.generate(LABELS), toy.generate(LABELS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "must be a list"),
        ({"labels": 3}, "must be a list"),
        ({"labels": [1], "batch": 0}, "batch is 0"),
        ({"labels": [1], "seed": -1}, "seed -1 is out of range"),
        ({"labels": [0] * 20 + [9]}, "input 'label' is 9"),
        ({"labels": [1], "cgf": 3}, "unknown input 'cgf'"),
        ({"labels": [1, 2], "shift": [0.0]}, r"'shift' has shape \(1,\); it must be \(2,\)"),
    ],
)
def test_wrong_arguments(toy, arguments, message):
    with pytest.raises(InputError, match=message):
        toy.generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"provider": "tpu"}, "unknown provider 'tpu'; one of auto, cpu, cuda"),
        ({"provider": "cpu", "options": "fast"}, "unknown option set 'fast'; one of serve, exact"),
        ({"provider": "cpu", "threads": 0}, "0 threads"),
        ({"provider": "cpu", "target": "ort-cuda"}, r"not lowered to 'ort-cuda' \(lowered to: toy\)"),
    ],
)
def test_wrong_options(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        runtime.load(folder, **arguments)


@pytest.mark.skipif(ort_cuda.device_count() > 0, reason="there is a GPU")
def test_cuda_without_a_device(folder, capfd):
    with pytest.raises(InputError, match=r"built without CUDA|no CUDA device on this machine"):
        runtime.load(folder, provider="cuda")
    assert runtime.load(folder, provider="auto").provider == "cpu"
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(ort_cuda.device_count() > 0, reason="there is a GPU")
def test_cuda_that_does_not_start_is_no_silent_fallback(folder, monkeypatch, capfd):
    """As on a machine with a GPU but without the CUDA libraries."""
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime without CUDA")
    monkeypatch.setattr(session, "device_count", lambda: 1)
    with pytest.raises(
        InputError, match=r"could not start CUDAExecutionProvider.*onnxruntime-gpu\[cuda,cudnn\]"
    ) as caught:
        runtime.load(folder, provider="auto")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(ort_cuda.device_count() == 0, reason="no GPU")
def test_cuda_gives_the_same_images(folder, toy):
    loaded = runtime.load(folder, provider="cuda", options="exact")
    np.testing.assert_allclose(loaded.generate(LABELS), toy.generate(LABELS), atol=1e-5)


def test_damaged_bundle_is_not_loaded(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "toy"))
    os.truncate(copy / "weights.data", 10)
    with pytest.raises(BundleError, match="truncated"):
        runtime.load(copy, "cpu")


@pytest.mark.parametrize("location", ["../weights.data", "/etc/hostname", "gone.data"])
@pytest.mark.parametrize("subfolder", [False, True])
def test_external_data_outside_the_bundle(tmp_path, location, subfolder):
    (tmp_path / "weights.data").write_bytes(bytes(4096))
    toy_bundle.write(tmp_path / "toy", location=location)
    config = session_config("cpu", "exact", QuantTraits())
    file = tmp_path / "toy/decode.onnx"
    if subfolder:
        file = file.rename(tmp_path / "toy/reports.onnx").parent / "sub/decode.onnx"
        file.parent.mkdir()
        (tmp_path / "toy/reports.onnx").rename(file)
    with pytest.raises(BundleError, match=r"decode\.onnx: onnxruntime cannot load this graph") as caught:
        session.make_session(file, tmp_path / "toy", config)
    assert "\n" not in str(caught.value)


def test_graph_that_fails_at_run(toy):
    backend = toy.player.backend
    acc, by = backend.zeros((2, 2), "float32"), backend.zeros((3,), "float32")
    with pytest.raises(BundleError, match="graph 'drift' failed in onnxruntime") as caught:
        backend.run("drift", {"acc": acc, "by": by}, ("acc_next",))
    assert "\n" not in str(caught.value)


def test_option_sets():
    int4, fp8 = frozenset({"int4"}), frozenset({"fp8-e4m3"})
    level = "session.qdq_matmulnbits_accuracy_level"
    assert session_config("cpu", "exact", QuantTraits()).entries[level] == "0"
    assert session_config("cpu", "serve", QuantTraits()).entries[level] == "4"
    for options in ("exact", "serve"):
        assert session_config("cpu", options, QuantTraits()).entries["session.intra_op.allow_spinning"] == "0"
    assert session_config("cpu", "serve", QuantTraits(fp8)).entries["session.disable_quant_qdq"] == "1"
    assert "session.disable_quant_qdq" not in session_config("cpu", "serve", QuantTraits(int4)).entries
    assert session_config("cuda", "exact", QuantTraits()).provider_options == {"use_tf32": "0"}
    assert session_config("cuda", "serve", QuantTraits(int4)).entries == {}
    assert session_config("cuda", "serve", QuantTraits(int4, fp8)).entries == {}
    assert session_config("cuda", "serve", QuantTraits(frozenset(), fp8)).entries == {"session.disable_quant_qdq": "1"}


@pytest.mark.parametrize(
    ("exact", "weight_only", "entry"),
    [
        (True, set(), None),
        (True, {"int8"}, None),
        (True, {"int4"}, None),
        (False, set(), "session.x64quantprecision"),
        (False, {"int4"}, "session.x64quantprecision"),
        (False, {"int8"}, "session.disable_quant_qdq"),
        (False, {"int6"}, "session.disable_quant_qdq"),
    ],
)
def test_int8_products_beside_other_weights(exact, weight_only, entry, monkeypatch):
    monkeypatch.setattr(ort_cpu, "sums_exactly", lambda: exact)
    int8 = frozenset({"int8"})
    entries = session_config("cpu", "serve", QuantTraits(frozenset(weight_only), int8, int8, integer=True)).entries
    decided = {name for name in entries if name in ("session.x64quantprecision", "session.disable_quant_qdq")}
    assert decided == ({entry} if entry else set())


def test_quant_traits_of_a_layer_table():
    rows = (
        {"name": "a", "graph": "step", "format": "int4", "algorithm": "rtn"},
        {"name": "b", "graph": "step", "format": "fp8-e4m3", "algorithm": "rtn", "activation_format": "fp8-e4m3"},
        {"name": "kept", "graph": "step", "format": "float32", "algorithm": None},
        {"name": "c", "graph": "decode", "format": "int8", "algorithm": "rtn", "activation_format": "int8"},
    )
    plan = toy_bundle.plan(dict.fromkeys(("tab", "drifts")))
    int4, int8, fp8 = (frozenset({name}) for name in ("int4", "int8", "fp8-e4m3"))
    manifest = toy_bundle.manifest(plan, layers=rows)
    assert quant_traits(manifest, "step") == QuantTraits(int4, fp8, activations=fp8)
    assert quant_traits(manifest, "decode") == QuantTraits(frozenset(), int8, activations=int8, integer=True)
    assert quant_traits(manifest) == QuantTraits(int4, fp8 | int8, activations=fp8 | int8, integer=True)


def test_plays_without_torch_and_onnx(folder):
    script = f"""
import json, sys
from qexport import runtime
images = runtime.load({str(folder)!r}, "cpu").generate([1], seed=5)
heavy = [m for m in ("torch", "onnx", "onnx_ir", "onnxscript", "scipy", "matplotlib") if m in sys.modules]
print(json.dumps([heavy, images.ravel().tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    heavy, pixels = json.loads(done.stdout)
    assert heavy == []
    np.testing.assert_allclose(np.reshape(pixels, (1, 3, 2, 2)), toy_bundle.expected([1], 5), atol=2e-6)
    assert done.stderr == ""
