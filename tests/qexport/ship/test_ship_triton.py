"""The model repository: configurations as Triton reads them, and the player as Triton runs it.

`fixtures/triton-model-config.binpb` is the file descriptor of Triton's model_config.proto as tritonclient 2.73 carries
it, so that protobuf's own parser checks our text. What Triton's Python backend offers a model is imitated here, with
ONNX Runtime behind it; `benchmarks/triton_check.py` runs the same repository in a real server.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import toy_bundle
from google.protobuf import descriptor_pool, message_factory, text_format

from qexport.errors import InputError
from qexport.runtime import load
from qexport.ship.pbtxt import Word, dumps, entries
from qexport.ship.triton import write_repository

DESCRIPTOR = Path(__file__).parents[2] / "fixtures" / "triton-model-config.binpb"
NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_UINT64": np.uint64}


def model_config_class():
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(DESCRIPTOR.read_bytes())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def config(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_class()())


def type_name(message, field, value):
    return message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[value].name


@pytest.fixture(scope="module")
def repository(w4_bundle, tmp_path_factory):
    return write_repository(w4_bundle, tmp_path_factory.mktemp("triton") / "repository", name="var c10", max_batch=4)


def test_text_format_is_protobufs():
    message = {
        "name": 'a "b"\\\n',
        "max_batch_size": 3,
        "input": [{"name": "x", "data_type": Word("TYPE_INT64"), "dims": [1, -1], "optional": True}, {"name": "y"}],
        "instance_group": [],
        "platform": None,
        "parameters": entries({"k": {"string_value": "v"}}),
    }
    parsed = text_format.Parse(dumps(message), model_config_class()())
    assert parsed.name == 'a "b"\\\n'
    assert [list(i.dims) for i in parsed.input] == [[1, -1], []]
    assert parsed.input[0].optional
    assert parsed.parameters["k"].string_value == "v"
    with pytest.raises(text_format.ParseError):
        text_format.Parse(dumps({"nmae": "x"}), model_config_class()())


@pytest.mark.parametrize("graph", ["step", "decode"])
def test_graphs_are_declared_as_they_are(repository, graph):
    folder = repository.path / f"var_c10_{graph}"
    parsed = config(folder)
    assert (parsed.name, parsed.backend) == (folder.name, "onnxruntime")
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    ports = {port.name: port for port in (*session.get_inputs(), *session.get_outputs())}
    assert {i.name for i in parsed.input} == {i.name for i in session.get_inputs()}
    batched = parsed.max_batch_size > 0
    assert batched == parsed.HasField("dynamic_batching") == (graph == "decode")
    for tensor in (*parsed.input, *parsed.output):
        shape = ports[tensor.name].shape
        assert shape, f"{tensor.name}: Triton loads no model with a tensor without dimensions"
        if batched:
            assert shape[0] == "batch"
        expected = [size if isinstance(size, int) else -1 for size in shape[1 if batched else 0 :]]
        assert list(tensor.dims) == expected
        spelled = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}[ports[tensor.name].type]
        assert type_name(tensor, "data_type", tensor.data_type) == spelled
    (warm_up,) = parsed.model_warmup
    assert set(warm_up.inputs) == {i.name for i in parsed.input}
    feeds = {}
    for name, given in warm_up.inputs.items():
        kind = NUMPY[type_name(given, "data_type", given.data_type)]
        data = np.fromfile(folder / "warmup" / given.input_data_file, kind)
        feeds[name] = data.reshape([warm_up.batch_size, *given.dims] if batched else list(given.dims))
    for value in session.run(None, feeds):
        assert np.isfinite(value).all()


def test_the_player_is_declared(repository):
    parsed = config(repository.path / "var_c10")
    assert (parsed.backend, parsed.max_batch_size) == ("python", 4)
    assert {i.name for i in parsed.input if not i.optional} == {"label"}
    assert {i.name for i in parsed.input} == {"label", "seed", "index", "cfg", "top_k", "top_p", "temperature"}
    assert list(parsed.output[0].dims) == [3, 32, 32]
    assert repository.models == ("var_c10", "var_c10_step", "var_c10_decode")


class FakeTriton:
    """What `triton_python_backend_utils` gives a model, with ONNX Runtime for the models that it calls."""

    def __init__(self, root):
        self.sessions = {}
        for folder in root.iterdir():
            if (folder / "1" / "model.onnx").exists():
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
                file = folder / "1" / "model.onnx"
                self.sessions[folder.name] = onnxruntime.InferenceSession(
                    file, options, providers=["CPUExecutionProvider"]
                )
        self.batches = []

    def module(self):
        fake = self

        class Tensor:
            def __init__(self, name, array):
                assert array.ndim, f"{name}: Triton has no tensors without dimensions"
                self._name, self._array = name, array

            def name(self):
                return self._name

            def as_numpy(self):
                return self._array

            def is_cpu(self):
                return True

        class Response:
            def __init__(self, output_tensors=(), error=None):
                self.tensors, self._error = {t.name(): t for t in output_tensors}, error

            def has_error(self):
                return self._error is not None

            def error(self):
                return self._error

        class Error:
            def __init__(self, text):
                self._text = text

            def message(self):
                return self._text

        class Request:
            def __init__(self, model_name, requested_output_names, inputs):
                self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

            def exec(self):
                feeds = {t.name(): t.as_numpy() for t in self.inputs}
                if "label" in feeds:
                    fake.batches.append(len(feeds["label"]))
                try:
                    values = fake.sessions[self.model].run(self.wanted, feeds)
                except Exception as error:
                    return Response(error=Error(str(error)))
                return Response([Tensor(n, v) for n, v in zip(self.wanted, values, strict=True)])

        module = types.ModuleType("triton_python_backend_utils")
        vars(module).update(
            Tensor=Tensor,
            InferenceResponse=Response,
            TritonError=Error,
            InferenceRequest=Request,
            get_input_tensor_by_name=lambda request, name: request.get(name),
            get_output_tensor_by_name=lambda response, name: response.tensors[name],
        )
        return module


class Served:
    """The player's model as Triton would run it."""

    def __init__(self, root, name, monkeypatch, max_batch=4):
        self.triton = FakeTriton(root)
        self.module = self.triton.module()
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self.module)
        namespace: dict = {"__name__": "model"}
        source = (root / name / "1" / "model.py").read_text()
        exec(compile(source, "model.py", "exec"), namespace)
        self.model = namespace["TritonPythonModel"]()
        arguments = {"model_repository": str(root / name), "model_version": "1"}
        self.model.initialize({**arguments, "model_config": json.dumps({"max_batch_size": max_batch})})

    def ask(self, *requests):
        """Answers to requests that come together; inputs as arrays by name."""
        tensors = [{n: self.module.Tensor(n, a.reshape(-1, 1)) for n, a in request.items()} for request in requests]
        return self.model.execute(tensors)


def labels(*values):
    return {"label": np.array(values, np.int64)}


def test_it_draws_what_the_player_draws(repository, w4_bundle, monkeypatch):
    served = Served(repository.path, "var_c10", monkeypatch)
    (answer,) = served.ask({**labels(1, 8, 3), "seed": np.full(3, 7, np.uint64)})
    runtime = load(w4_bundle.path, provider="cpu", options="exact", threads=1)
    np.testing.assert_array_equal(answer.tensors["image"].as_numpy(), runtime.generate([1, 8, 3], seed=7), strict=True)


def test_requests_together_and_one_that_is_wrong(toy_shipped, tmp_path, monkeypatch):
    root = write_repository(toy_shipped, tmp_path / "r", max_batch=4).path
    served = Served(root, "toy", monkeypatch)
    half = np.array([0.5], np.float32)
    answers = served.ask(
        {**labels(1), "seed": np.array([9], np.uint64), "index": np.array([4], np.uint64)},
        labels(4),
        {**labels(2), "gain": half},
        {**labels(0, 3), "shift": np.array([0.25, 0], np.float32)},
        {},
        {**labels(0, 3), "shift": np.array([0.25], np.float32)},
    )
    wanted = [
        toy_bundle.expected([1], 9, 4),
        None,
        toy_bundle.expected([2], gain=0.5),
        np.concatenate([toy_bundle.expected([0], shift=0.25), toy_bundle.expected([3], first_index=1)]),
        None,
        None,
    ]
    for answer, want in zip(answers, wanted, strict=True):
        assert answer.has_error() == (want is None)
        if want is not None:
            np.testing.assert_allclose(answer.tensors["image"].as_numpy(), want, atol=1e-5)
    assert "0 ... 3" in answers[1].error().message()
    assert "missing" in answers[4].error().message()
    assert "different numbers" in answers[5].error().message()
    assert served.triton.batches == [3] * 3 + [2] * 3  # three rows of one gain; the other's single row, doubled


def test_a_failing_graph_is_an_error_of_its_requests(toy_shipped, tmp_path, monkeypatch):
    served = Served(write_repository(toy_shipped, tmp_path / "r").path, "toy", monkeypatch)
    del served.triton.sessions["toy_drift"]
    (answer,) = served.ask(labels(0))
    assert "toy_drift" in answer.error().message()


def test_weights_are_one_copy_and_links_to_it(toy_shipped, tmp_path, monkeypatch):
    def inodes(root):
        return [path.stat().st_ino for path in root.rglob("weights.data")]

    own = toy_shipped.path / "weights.data"
    linked = write_repository(toy_shipped, tmp_path / "linked")
    assert len(inodes(linked.path)) == 4
    (copy,) = set(inodes(linked.path))
    assert copy != own.stat().st_ino
    assert own.stat().st_nlink == 1, "onnx refuses external data of several names: the bundle must stay readable"

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    parted = write_repository(toy_shipped, tmp_path / "parted")
    assert len(set(inodes(parted.path))) == 4
    assert parted.size_bytes == linked.size_bytes + 3 * own.stat().st_size


def test_refusals_and_nothing_left_behind(toy_shipped, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("")
    with pytest.raises(InputError, match="new folder"):
        write_repository(toy_shipped, taken)
    monkeypatch.setattr("qexport.ship.triton._plan_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(InputError, match="no space left"):
        write_repository(toy_shipped, tmp_path / "r")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
