"""Capture and composition: parts laid out as one graph compute what the whole module computes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from qexport.family import GraphSpec, Part, Port
from qexport.graph import build
from qexport.graph.capture import capture, parameter_names

WIDTH = 8


class Before(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)

    def forward(self, x):
        return (self.embed(x),)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, past):
        grown = torch.cat((past, self.norm(x)), dim=1)
        return x + torch.tanh(self.fc(grown.mean(1, keepdim=True))), grown


class Whole(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.before = Before()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x, *past):
        (x,) = self.before(x)
        grown = []
        for block, old in zip(self.blocks, past, strict=True):
            x, new = block(x, old)
            grown.append(new)
        return x, *grown


def spec_of(whole: Whole, *, in_parts: bool) -> GraphSpec:
    depth = len(whole.blocks)
    x_in = Port("x", "float32", ("2*batch", "tokens", 4))
    x = Port("hidden", "float32", ("2*batch", "tokens", WIDTH))
    parts = (
        Part((whole.before,), (x_in,), (x,), prefix="before."),
        Part(
            tuple(whole.blocks),
            (x, Port("past.{i}", "float32", ("2*batch", "past", WIDTH))),
            (x, Port("grown.{i}", "float32", ("2*batch", "total", WIDTH))),
            prefix="blocks.{i}.",
        ),
    )
    return GraphSpec(
        "toy",
        whole,
        (x_in, *(Port(f"past.{i}", "float32", ("2*batch", "past", WIDTH)) for i in range(depth))),
        (x, *(Port(f"grown.{i}", "float32", ("2*batch", "total", WIDTH)) for i in range(depth))),
        {"batch": 2, "tokens": 3, "past": 5, "total": 8},
        parts if in_parts else (),
    )


def run(spec: GraphSpec, feeds, tmp_path):
    model = capture(spec)
    parameters = {name: value.detach().numpy() for name, value in spec.parameters().items()}
    assert set(parameter_names(model)) == set(parameters)
    build.normalise(model)
    import onnx_ir as ir

    flipped = build.transposed_parameters(model)
    for name in parameter_names(model):
        array = parameters[name].T if name in flipped else parameters[name]
        model.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    build.save(model, tmp_path / "toy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "toy.onnx", providers=["CPUExecutionProvider"])
    return model, session.run(None, feeds)


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "parts"])
def test_graph_computes_what_the_module_computes(in_parts, tmp_path):
    torch.manual_seed(0)
    whole = Whole(3).eval()
    feeds = {"x": torch.randn(4, 1, 4), **{f"past.{i}": torch.randn(4, 2, WIDTH) for i in range(3)}}
    with torch.no_grad():
        want = whole(*feeds.values())
    model, got = run(spec_of(whole, in_parts=in_parts), {k: v.numpy() for k, v in feeds.items()}, tmp_path)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)
    assert {node.name for node in model.graph} >= {f"blocks.{i}.fc" for i in range(3)} | {"before.embed"}


def test_an_empty_past_works(tmp_path):
    torch.manual_seed(0)
    whole = Whole(2).eval()
    feeds = {"x": torch.randn(2, 3, 4), **{f"past.{i}": torch.zeros(2, 0, WIDTH) for i in range(2)}}
    with torch.no_grad():
        want = whole(*feeds.values())
    _, got = run(spec_of(whole, in_parts=True), {k: v.numpy() for k, v in feeds.items()}, tmp_path)
    np.testing.assert_allclose(got[0], want[0].numpy(), rtol=1e-5, atol=1e-6)


def test_a_port_that_nothing_feeds_is_named():
    whole = Whole(1)
    spec = spec_of(whole, in_parts=True)
    orphan = Part(
        spec.parts[1].modules,
        (Port("nowhere", "float32", ("2*batch", "tokens", WIDTH)), *spec.parts[1].inputs[1:]),
        spec.parts[1].outputs,
        "blocks.{i}.",
    )
    broken = GraphSpec(spec.name, whole, spec.inputs, spec.outputs, spec.example_dims, (spec.parts[0], orphan))
    with pytest.raises(ValueError, match="nothing feeds port 'nowhere'"):
        capture(broken)
