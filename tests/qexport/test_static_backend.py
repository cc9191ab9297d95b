"""Fixed addresses: the same images, a bounded number of bindings, and the graph ids that CUDA would see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qexport.errors import BundleError, InputError
from qexport.runtime import Player, load
from qexport.runtime.captured import captured_sessions, static_backend
from qexport.runtime.ort_backend import OrtBackend
from qexport.runtime.runtime import quant_traits
from qexport.runtime.session import make_session
from qexport.runtime.static_backend import GRAPH_ID, NOT_CAPTURED, StaticBackend, check_plan
from qexport.targets import ort_cuda, session_config
from qexport.targets.config import QuantTraits


def sessions(bundle) -> dict[str, onnxruntime.InferenceSession]:
    return {
        name: make_session(file, bundle.path, session_config("cpu", "exact", quant_traits(bundle.manifest, name)), 1)
        for name, file in bundle.graph_files().items()
    }


def test_images_are_the_same_and_bindings_repeat(w4_bundle):
    want = load(w4_bundle.path, provider="cpu", options="exact", threads=1, check="size")
    backend = StaticBackend(sessions(w4_bundle), "cpu")
    player = Player(w4_bundle.plan, backend, w4_bundle.tables())
    counts = []
    for seed in range(4):
        got = player.play({"label": [1, seed]}, seed=seed)
        np.testing.assert_array_equal(got, want.player.play({"label": [1, seed]}, seed=seed))
        counts.append(backend.bindings)
    assert counts[0] < counts[1]  # the first image only learns shapes
    assert counts[2] == counts[3] <= 3 * 8  # seven scales and the decoder: no address is new any more
    player.play({"label": [3]}, seed=0)
    np.testing.assert_array_equal(
        player.play({"label": [3]}, seed=1), want.player.play({"label": [3]}, seed=1)
    )  # another batch has buffers of its own


class Recorder:
    """A session that keeps the options of its runs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session, self.ids = session, []

    def __getattr__(self, name: str):
        return getattr(self.session, name)

    def run_with_iobinding(self, binding, options=None) -> None:
        self.ids.append(options.get_run_config_entry(GRAPH_ID))
        self.session.run_with_iobinding(binding)


@pytest.fixture
def adder(tmp_path) -> Path:
    """next = x + by."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "by", "next")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "by"], ["next"])], "add", ports[:2], ports[2:])
    (tmp_path / "add.onnx").write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    return tmp_path / "add.onnx"


def test_one_graph_id_for_each_set_of_addresses(adder):
    recorder = Recorder(make_session(adder, adder.parent, session_config("cpu", "exact", QuantTraits()), 1))
    backend = StaticBackend({"add": recorder}, "cpu", captured=True)
    for batch in (2, 3):
        x = backend.zeros((batch, 2), "float32")
        for step in range(1, 7):
            by = backend.put(np.full((batch, 2), step, np.float32))
            x = backend.run("add", {"x": x, "by": by}, ("next",))["next"]
            assert (backend.get(x) == sum(range(1, step + 1))).all()
    first, rest = recorder.ids[:6], recorder.ids[6:]
    assert first[0] == NOT_CAPTURED  # shapes of outputs are not known yet
    assert rest[0] == NOT_CAPTURED
    assert len(set(first[1:])) <= 3  # from the first result, then back and forth between two buffers
    assert first[-1] == first[-3]
    assert set(first[1:]).isdisjoint(rest[1:])  # another shape, other ids


def test_the_ordinary_backend_allocates_anew(adder):
    """What the test above would see if results were not overwritten: here every value lives on."""
    session = make_session(adder, adder.parent, session_config("cpu", "exact", QuantTraits()), 1)
    backend = OrtBackend({"add": session}, "cpu")
    x = backend.zeros((2, 2), "float32")
    one = backend.put(np.ones((2, 2), np.float32))
    results = [x]
    for _ in range(4):
        results.append(backend.run("add", {"x": results[-1], "by": one}, ("next",))["next"])
    assert [float(backend.get(value)[0, 0]) for value in results] == [0, 1, 2, 3, 4]


def test_failures_are_named(adder):
    session = make_session(adder, adder.parent, session_config("cpu", "exact", QuantTraits()), 1)
    backend = StaticBackend({"add": session}, "cpu")
    x = backend.zeros((2, 2), "float32")
    with pytest.raises(BundleError, match="graph 'add' failed"):
        backend.run("add", {"x": x, "by": backend.zeros((3, 2), "float32")}, ("next",))


def test_the_provider_option():
    plain = session_config("cuda", "serve", QuantTraits())
    assert ort_cuda.captured(plain).provider_options == {**plain.provider_options, "enable_cuda_graph": "1"}
    assert "enable_cuda_graph" not in plain.provider_options


def test_a_plan_that_keeps_results_longer_is_refused(w4_bundle):
    plan = w4_bundle.plan
    check_plan(plan)
    first = plan.calls[0]
    port = next(iter(first.outputs))
    other = replace(first, outputs={**first.outputs, port: plan.output})
    with pytest.raises(InputError, match=f"several states at '{port}'"):
        check_plan(replace(plan, calls=(first, other, *plan.calls[1:])))


def test_cuda_graphs_want_cuda(w4_bundle):
    with pytest.raises(InputError, match="CUDA graphs need CUDA, and the provider is cpu"):
        load(w4_bundle.path, provider="cpu", cuda_graphs=True, check="size")


def test_graphs_that_refuse_capture_run_as_ever(w4_bundle, monkeypatch):
    """What ONNX Runtime does with a graph that copies to the host, played by a stand-in: no GPU is needed."""
    real, asked = make_session, []

    def refusing(file, root, config, threads=None):
        asked.append((file.name, "enable_cuda_graph" in config.provider_options))
        if asked[-1] == ("step.onnx", True):
            raise BundleError("cannot use the graph capture feature")
        return real(file, root, replace(config, provider_options={}), threads)

    monkeypatch.setattr("qexport.runtime.captured.make_session", refusing)
    files = w4_bundle.graph_files()
    configs = {name: session_config("cpu", "exact", quant_traits(w4_bundle.manifest, name)) for name in files}
    found, refused = captured_sessions(files, w4_bundle.path, configs, 1)
    assert refused == ("step",)
    assert set(found) == set(files)
    assert ("step.onnx", False) in asked
    assert ("decode.onnx", False) not in asked
    player = Player(w4_bundle.plan, static_backend(w4_bundle.plan, found, "cpu"), w4_bundle.tables())
    want = load(w4_bundle.path, provider="cpu", options="exact", threads=1, check="size").player
    for seed in range(3):
        np.testing.assert_array_equal(player.play({"label": [1]}, seed=seed), want.play({"label": [1]}, seed=seed))
