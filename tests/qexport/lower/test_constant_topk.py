"""`TopK` of a constant count: the same k-th entries and masses, and tokens, without a count that the host must know."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from lowering import graph_of, normal, operators, refused, rewritten, run
from onnx_ir.passes import common
from qexport_models.sampling import draw_tokens

from qexport.lower.passes.constant_topk import MOST, ConstantTopk

V = 64

FILTER = f"""g (float[B, L, {V}] x, int64[1] k) => (float[B, L, 1] kth, float[B, L, {V}] mass, float[B, L, 1] best) {{
    v, i = TopK <axis = -1> (x, k)
    kth = Slice (v, minus_one, end, minus_one, one)
    first = Slice (v, zero, one, minus_one, one)
    d = Sub (v, first)
    e = Exp (d)
    n = Sub (width, k)
    pads = Concat <axis = 0> (none, n)
    mass = Pad (e, pads, nothing)
    best = GatherElements <axis = -1> (v, place)
}}"""
"""What the sampler does with the k best: the threshold of top-k, the masses that top-p searches, and one of them."""


def parameters(width: int = V) -> dict[str, np.ndarray]:
    return {
        "minus_one": np.array([-1]), "zero": np.array([0]), "one": np.array([1]), "end": np.array([2**63 - 1]),
        "width": np.array([width]), "none": np.zeros(5, np.int64), "nothing": np.array(0, np.float32),
        "place": np.zeros((3, 2, 1), np.int64),
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 5, V])
def test_entries_and_masses(k):
    model = graph_of(FILTER, **parameters())
    rewritten(model, ConstantTopk(), {"x": normal(3, 2, V), "k": np.array([k])}, times=1)
    assert "Pad" not in operators(model)
    count = next(node for node in model.graph if node.op_type == "TopK").inputs[1]
    assert count is not None
    assert count.is_initializer()
    assert count.const_value is not None
    assert count.const_value.numpy().tolist() == [V]


def test_equal_entries():
    """The k-th of equal ones is as good as any, and what lies behind it stays masked."""
    rewritten(graph_of(FILTER, **parameters()), ConstantTopk(),
              {"x": np.round(normal(3, 2, V)), "k": np.array([7])}, times=1)  # fmt: skip


def test_rows_without_tokens():
    text = FILTER.replace("B, L,", "B,")
    wanted = parameters() | {"none": np.zeros(3, np.int64), "place": np.zeros((3, 1), np.int64)}
    rewritten(graph_of(text, **wanted), ConstantTopk(), {"x": normal(3, V), "k": np.array([5])}, times=1)


@pytest.mark.parametrize(("op_type", "wrong"), [("Less", "LessOrEqual"), ("Gather", None)])
def test_one_entry_more_would_be_seen(op_type, wrong):
    model = graph_of(FILTER, **parameters())
    given = {"x": normal(3, 2, V), "k": np.array([5])}
    want = run(model, given)
    ConstantTopk()(model)
    common.RemoveUnusedNodesPass()(model)
    node = next(node for node in model.graph if node.op_type == op_type)
    if wrong:
        node.op_type = wrong
    else:
        node.replace_input_with(1, next(value for value in model.graph.inputs if value.name == "k"))
    got = run(model, given)
    assert {name for name in want if not np.array_equal(got[name], want[name])} == {"mass" if wrong else "kth"}


WIDE = FILTER.replace(f"{V}]", f"{MOST + 1}]")
UNKNOWN = FILTER.replace(f"{V}] x", "V] x")
COUNTED = FILTER.replace(", int64[1] k", "")


@pytest.mark.parametrize(
    ("text", "change", "reason"),
    [
        (WIDE, {"width": np.array([MOST + 1])}, f"more than {MOST} entries"),
        (UNKNOWN, {}, "a size that is not known"),
        (FILTER.replace("TopK <axis = -1>", "TopK <axis = 1>"), {}, "not the largest along the last axis"),
        (FILTER.replace("TopK <axis = -1>", "TopK <axis = -1, largest = 0>"), {}, "not the largest"),
        (FILTER.replace("=> (", "=> (int64[B, L, K] i, "), {}, "its indices are read"),
        (FILTER.replace("    d =", "    j = Neg (i)\n    d ="), {}, "its indices are read"),
        (FILTER.replace("=> (", "=> (float[B, L, K] v, "), {}, "its values are an output"),
        (FILTER.replace("    d =", "    t = ReduceSum (v)\n    d ="), {}, "ReduceSum reads it"),
        (FILTER, {"nothing": np.array(1, np.float32)}, "Sub reads it"),
        (FILTER.replace("= Pad (", '= Pad <mode = "edge"> ('), {}, "Sub reads it"),
        (FILTER, {"zero": np.array([1]), "one": np.array([2])}, "Slice reads it"),
        (COUNTED, {"k": np.array([5])}, ""),
    ],
    ids=["wide", "unknown", "axis", "smallest", "indices out", "indices", "values out", "sum", "padded with ones",
         "padded with edges", "the second", "constant"],
)  # fmt: skip
def test_where_the_count_stays(text, change, reason):
    refused(graph_of(text, **(parameters() | change)), ConstantTopk(), reason)


class Sampler(torch.nn.Module):
    """The models' own, as a graph."""

    def forward(self, logits, uniform, top_k, top_p, temperature):
        return draw_tokens(logits, uniform, top_k, top_p, temperature)


PORTS = ("logits", "uniform", "top_k", "top_p", "temperature")


@pytest.fixture(scope="module")
def samplers() -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """The sampler's graph as exported, and rewritten."""
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.onnx.export(
        Sampler().eval(),
        (torch.randn(3, 4, V), torch.rand(3, 4), torch.tensor(20), torch.tensor(0.9), torch.tensor(1.0)),
        input_names=list(PORTS),
        output_names=["tokens"],
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}, None, None, None),
        opset_version=23,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    before = program.model_proto.SerializeToString()
    model = ir.serde.deserialize_model(program.model_proto)
    common.ShapeInferencePass()(model)
    step = ConstantTopk()
    assert step(model).modified, step.refused
    assert not step.refused
    common.RemoveUnusedNodesPass()(model)
    assert "Pad" not in operators(model)
    after = ir.serde.serialize_model(model).SerializeToString()
    first, second = (onnxruntime.InferenceSession(one, providers=["CPUExecutionProvider"]) for one in (before, after))
    return first, second


def case(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    uniform = rng.random((5, 37), np.float32)
    uniform[0, 0], uniform[0, 1] = 0, np.nextafter(np.float32(1), np.float32(0))
    return {"logits": rng.normal(size=(5, 37, V)).astype(np.float32) * 3, "uniform": uniform}


def tokens_of(session: onnxruntime.InferenceSession, given: Mapping[str, np.ndarray], k: int, p: float) -> np.ndarray:
    settings = {"top_k": np.array(k), "top_p": np.array(p, np.float32), "temperature": np.array(1, np.float32)}
    return np.asarray(session.run(None, {**given, **settings})[0])


@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("top_k", [0, 1, 50, V, 900])
def test_the_same_tokens(samplers, top_k, top_p):
    given = case(top_k)
    want, got = (tokens_of(session, given, top_k, top_p) for session in samplers)
    np.testing.assert_array_equal(got, want)


def test_the_settings_matter(samplers):
    """Were a filter off in both graphs, they would agree as well."""
    given = case(0)
    drawn = {
        tokens_of(samplers[1], given, k, p).tobytes() for k, p in ((0, 0.0), (1, 0.0), (5, 0.0), (0, 0.5), (0, 0.9))
    }
    assert len(drawn) == 5
    np.testing.assert_array_equal(tokens_of(samplers[1], given, 1, 0.0), given["logits"].argmax(-1))
