"""Equal signatures are equal graphs; whatever might make another graph makes another signature, or none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qexport.family import GraphSpec, Port
from qexport.graph import capture as capturing
from qexport.graph.capture import capture
from qexport.graph.signature import signature


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 4


class Layer(nn.Module):
    def __init__(self, width: int = 4, power: float = 2.0, act=F.relu, extra=None) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.power, self.act, self.extra, self.sizes = power, act, extra, Sizes(width)
        self.steps = [1, 2]

    def forward(self, x):
        return (self.act(self.fc(x)) ** self.power,)


def with_dropout() -> nn.Module:
    layer = Layer()
    layer.add_module("drop", nn.Dropout())
    return layer


def with_hook() -> nn.Module:
    layer = Layer()
    layer.fc.register_forward_hook(lambda *_: None)
    return layer


def tied() -> nn.Module:
    """As `untied`, but for one weight that two layers share."""
    layer = untied()
    layer.again.weight = layer.fc.weight
    return layer


def untied() -> Layer:
    layer = Layer()
    layer.again = nn.Linear(4, 4)
    return layer


def changed(**attributes) -> nn.Module:
    layer = Layer()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def test_weights_do_not_count() -> None:
    assert signature(Layer()) == signature(Layer()) is not None
    assert hash(signature(Layer())) == hash(signature(Layer()))


@pytest.mark.parametrize(
    "other",
    [
        Layer(width=5), Layer(power=3.0), Layer(power=2), Layer(power=-0.0), Layer(act=F.gelu), Layer().eval(),
        with_dropout(),
        Layer(extra=torch.ones(2)), Layer(extra=torch.zeros(2)), Layer(extra={"a": 1}), Layer(extra={"a": 1.0}),
        changed(steps=(1, 2)), changed(steps=[1, 3]), changed(sizes=Sizes(5)), Layer().double(),
    ],
)  # fmt: skip
def test_everything_plain_counts(other: nn.Module) -> None:
    assert signature(other) is not None
    assert signature(other) != signature(Layer())


def test_each_of_them_is_another() -> None:
    layers = [
        Layer(extra=value) for value in (0.0, -0.0, 0, False, None, "", b"", (), [], {}, torch.zeros(1), float("nan"))
    ]
    found = {signature(layer) for layer in layers}
    assert len(found) == len(layers)
    assert None not in found


def test_what_cannot_be_told_has_none() -> None:
    shift = 1
    unknown = [object(), [object()], torch.ones(1, dtype=torch.bfloat16), torch.ones(1, device="meta"), np.array([{}])]
    for layer in (with_hook(), Layer(act=lambda x: x + shift), *(Layer(extra=value) for value in unknown)):
        assert signature(layer) is None


def test_weights_that_are_one_count() -> None:
    assert signature(tied()) == signature(tied()) is not None
    assert signature(tied()) != signature(untied()) is not None


def spec_of(layer: nn.Module) -> GraphSpec:
    ins, outs = ((Port(name, "float32", ("batch", 4)),) for name in ("x", "y"))
    return GraphSpec("toy", layer, ins, outs, {"batch": 2})


def test_the_same_architecture_is_traced_once_and_another_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace = capturing._trace
    monkeypatch.setattr(capturing, "_traces", type(capturing._traces)())
    monkeypatch.setattr(capturing, "_trace", lambda part, sizes: traced.append(1) or trace(part, sizes))
    layers = (Layer(), Layer(), Layer(act=F.gelu), Layer(), Layer(extra=object()), Layer(extra=object()))
    operators = [[node.op_type for node in capture(spec_of(layer)).graph] for layer in layers]
    assert len(traced) == 4  # two of them known, and those with an object never
    assert operators[0] == operators[1] == operators[3] == operators[4]
    assert "Relu" in operators[0]
    assert "Relu" not in operators[2]


def test_few_traces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "_traces", type(capturing._traces)())
    monkeypatch.setattr(capturing, "KEPT_TRACES", 2)
    monkeypatch.setattr(capturing, "_trace", lambda part, sizes: object())
    one, two, three = (spec_of(Layer(power=power)).all_parts[0] for power in (1.0, 2.0, 3.0))
    kept = {id(part): capturing._traced(part, {}) for part in (one, two)}
    assert capturing._traced(one, {}) is kept[id(one)]
    capturing._traced(three, {})
    assert capturing._traced(one, {}) is kept[id(one)]
    assert capturing._traced(two, {}) is not kept[id(two)]
