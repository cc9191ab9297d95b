"""Replaying trajectories stage by stage shows every layer exactly what it saw when the model sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import chain

import numpy as np
import pytest
import torch
from tiny_models import tiny_llamagen, tiny_shared_aln
from torch import Tensor

from qexport.calibrate import Replay, Trajectory, record, stages
from qexport.errors import InputError
from qexport.family import Generator
from qexport.pipeline import load_generator
from qexport.plan import Call
from qexport.recipe import Calibration
from qexport.reference import Interception, Window, layer_weights, torch_player

MODELS: dict[str, tuple[Callable[[], Generator], str | None]] = {
    "var-c10-d2": (lambda: load_generator("var-c10-d2"), None),
    "var-shared": (tiny_shared_aln, None),
    "dit-c10-d2": (lambda: load_generator("dit-c10-d2"), "ddim-10"),
    "llamagen-tiny": (tiny_llamagen, None),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def _sampled(generator: Generator, calibration: Calibration) -> dict[str, list[Tensor]]:
    """Layer → its input in every call, in order, while the model samples."""
    seen: dict[str, list[Tensor]] = {}

    def visit(layer: str, x: Tensor, window: Window | None) -> Tensor:
        seen.setdefault(layer, []).append(x)
        return x

    player = torch_player(generator)
    if calibration.schedule:
        player = player.with_schedule(calibration.schedule)
    with Interception(layer_weights(generator), visit):
        player.play({"label": np.arange(calibration.samples) % 10}, seed=calibration.seed)
    return seen


def _replayed(generator: Generator, trajectories: list[Trajectory]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}

    def tap(layer: str, x: Tensor, window: Window | None, step: int | None) -> Tensor:
        seen.setdefault(layer, []).append(x)
        return x

    weights = {
        (graph, name): (layer, layer_weights(generator)[layer])
        for layer, (graph, name) in {**generator.layers, **generator.decoder_layers}.items()
        if layer != "decode/quantize.embedding"  # a codebook: looked up, nothing is multiplied by it
    }
    for spec in generator.graphs:
        replay = Replay(generator, spec.name, trajectories)
        for stage in replay.stages:
            replay.advance(
                dict(weights[spec.name, name] for name in stage.parameters if (spec.name, name) in weights), tap
            )
    return seen


@pytest.mark.parametrize("model", MODELS)
def test_a_replay_shows_what_the_model_saw(model: str) -> None:
    build, schedule = MODELS[model]
    generator, calibration = build(), Calibration(3, 5, schedule)
    trajectories = record(generator, calibration, [spec.name for spec in generator.graphs])
    want, got = _sampled(generator, calibration), _replayed(generator, trajectories)
    assert set(got) == set(want)
    for layer, inputs in want.items():
        assert len(got[layer]) == len(inputs), layer
        for ours, theirs in zip(got[layer], inputs, strict=True):
            assert torch.equal(ours, theirs), layer


@pytest.mark.parametrize("model", ["var-c10-d2", "llamagen-tiny"])
def test_caches_are_carried_not_kept(model: str) -> None:
    """What is kept of a call does not grow with the caches, and without its own past a block sees something else."""
    generator, calibration = MODELS[model][0](), Calibration(2)
    (trajectory,) = record(generator, calibration, [generator.graphs[0].name])
    for call in trajectory:
        for name, value in call.feeds.items():
            if name.startswith("past_"):
                assert value.untyped_storage().nbytes() <= 4
    forgetful = replace(generator, plan=replace(generator.plan, calls=_without_caches(generator)))
    layer = next(name for name in generator.layers if name.endswith(("proj", "wo")))
    seen: list[Tensor] = []

    def tap(layer: str, x: Tensor, window: Window | None, step: int | None) -> Tensor:
        seen.append(x)
        return x

    replay = Replay(forgetful, generator.graphs[0].name, [trajectory])
    replay.advance()
    replay.run({layer: layer_weights(generator)[layer]}, tap)
    want = _sampled(generator, calibration)[layer]
    assert torch.equal(seen[0], want[0])
    assert not torch.allclose(seen[1], want[1], rtol=1e-2)


@pytest.mark.parametrize(("graphs", "decoded"), [(["step"], 0), (["step", "decode"], 1)])
def test_the_decoder_is_run_only_where_its_inputs_are_wanted(graphs: list[str], decoded: int) -> None:
    generator = load_generator("var-c10-d2")
    ran: list[int] = []
    generator.graph("decode").module.register_forward_hook(lambda *_: ran.append(1))
    (trajectory,) = record(generator, Calibration(2), graphs)
    assert len(ran) == decoded
    assert [call.graph for call in trajectory] == ["step"] * 7 + ["decode"] * decoded


def _without_caches(generator: Generator) -> tuple[Call, ...]:
    first, *rest = generator.plan.calls
    outputs = {port: state for port, state in first.outputs.items() if not port.startswith(("key", "value"))}
    return replace(first, outputs=outputs, in_place=()), *rest


def test_classes_take_turns_and_steps_are_numbered() -> None:
    generator = load_generator("var-c10-d2")
    trajectories = record(generator, Calibration(23, 1), ["step"])
    labels = [call.feeds["label"].tolist() for trajectory in trajectories for call in trajectory if call.step == 0]
    assert Counter(chain.from_iterable(labels)) == Counter(i % 10 for i in range(23))
    assert [call.step for call in trajectories[0]] == list(range(7))
    generator = load_generator("dit-c10-d2")
    (trajectory,) = record(generator, Calibration(1, 0, "ddpm-20"), ["denoise", "decode"])
    steps = [call.step for call in trajectory if call.graph == "denoise" and call.step is not None]
    assert steps == sorted(steps, reverse=True)
    assert set(steps) == set(range(10))
    assert trajectory[-1].step is None
    with pytest.raises(InputError, match="unknown schedule 'ddpm-7'"):
        record(generator, Calibration(1, 0, "ddpm-7"), ["denoise"])


def test_memory_is_bounded_and_all_timesteps_are_still_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = import_module("qexport.calibrate.record")  # the package has a function of that name
    generator = load_generator("dit-c10-d2")
    monkeypatch.setattr(recording, "BATCH", 2)
    monkeypatch.setattr(recording, "WIRE_BYTES", 2 << 20)
    whole = 8 * 50
    trajectories = record(generator, Calibration(8, 0, "ddim-50"), ["denoise", "decode"])
    calls = [call for trajectory in trajectories for call in trajectory if call.graph == "denoise"]
    assert 2 * len(calls) < whole / 4
    assert {call.step for call in calls} == set(range(10))
    assert max(Counter(call.step for call in calls).values()) <= 1 + min(Counter(call.step for call in calls).values())
    assert sum(call.graph == "decode" for trajectory in trajectories for call in trajectory) == 4


def test_stages_cover_every_parameter_once() -> None:
    for build, _ in MODELS.values():
        generator = build()
        for spec in generator.graphs:
            names = Counter(name for stage in stages(spec) for name in stage.parameters)
            assert max(names.values()) == 1
            learned = {name for name, value in spec.parameters().items() if isinstance(value, torch.nn.Parameter)}
            assert set(names) == learned


def test_a_weight_that_nothing_multiplies_is_reported() -> None:
    generator = load_generator("var-c10-d2")
    generator = replace(generator, layers={**generator.layers, "class_emb": ("step", "class_emb.weight")})
    replay = Replay(generator, "step", record(generator, Calibration(1), ["step"]))
    with pytest.raises(InputError, match="layer 'class_emb' was never reached"):
        replay.run({"class_emb": layer_weights(generator)["class_emb"]})
