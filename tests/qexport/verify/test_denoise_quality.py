"""The quality of a denoiser, on one whose output is known by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from qexport.errors import InputError
from qexport.family import DenoiseSpec
from qexport.plan import Call, Input, Noise, Plan, State
from qexport.runtime import Player
from qexport.verify.denoise_quality import (
    Trajectories,
    make_probe,
    output_quality,
    play_trajectories,
    runtime_student,
    torch_student,
    trajectory_quality,
)

SHAPE = ("batch", 2, 1, 3)


@dataclass
class Halving:
    """Says that the noise is half of what it sees, plus an error for late timesteps."""

    error: float = 0.0
    timesteps: int = 100

    def encode(self, images):
        return images.mean(dim=(1, 2))[:, None, None, :3].repeat(1, 2, 1, 1)

    def add_noise(self, latents, noise, t):
        return latents + noise * t[:, None, None, None] / self.timesteps

    def denoise(self, noisy, t, labels):
        late = (t >= 50).float()[:, None, None, None]
        return torch.cat([noisy / 2 + self.error * late, torch.full_like(noisy, torch.nan)], dim=1)

    def graph_inputs(self, noisy, t, labels):
        return {"x": noisy, "t": np.array(t), "label": labels}


class Backend:
    """The same on NumPy: `output` as the model, and x ← (1 + drift)·x + label."""

    def __init__(self, error=0.0, drift=0.0):
        self.error, self.drift = error, drift
        self.calls = 0

    def inputs(self, graph):
        return {"x": State("x", "float32", SHAPE), "label": Input("label", "int64", ("batch",))}

    def outputs(self, graph):
        return ["next_x", "output"]

    def put(self, array):
        return array

    get = put

    def run(self, graph, feeds, outputs):
        self.calls += 1
        x = feeds["x"]
        late = self.error if feeds.get("t", 0) >= 50 else 0.0
        moved = ((1 + self.drift) * x + feeds["label"][:, None, None, None]).astype(np.float32)
        return {"next_x": moved, "output": np.concatenate([x / 2 + np.float32(late), x], axis=1)}


PLAN = Plan(
    inputs=(Input("label", "int64", ("batch",)),),
    state=(State("x", "float32", SHAPE, "noise.z"),),
    noise=(Noise("z", "normal", SHAPE),),
    calls=(Call("g", {"x": "state.x", "label": "input.label"}, {"next_x": "x"}, repeat=3),),
    output="x",
)
SPEC = DenoiseSpec("g", Halving())


@pytest.fixture
def probe():
    images = np.linspace(0, 1, 6 * 3 * 4 * 4, dtype=np.float32).reshape(6, 3, 4, 4)
    return make_probe(Halving(), images, np.arange(6), seed=4, batch=4)


def test_probe(probe):
    assert probe.t.tolist() == [0, 19, 39, 59, 79, 99]
    assert probe.noise.shape == (6, 2, 1, 3)
    latents = probe.noisy - probe.noise * (probe.t / 100)[:, None, None, None]
    want = np.linspace(0, 1, 6 * 48).reshape(6, 3, 4, 4).mean(axis=(1, 2))[:, None, None, :3].repeat(2, axis=1)
    np.testing.assert_allclose(latents, want, atol=1e-6)


def test_probe_does_not_depend_on_the_batch(probe):
    images = np.linspace(0, 1, 6 * 3 * 4 * 4, dtype=np.float32).reshape(6, 3, 4, 4)
    np.testing.assert_array_equal(make_probe(Halving(), images, np.arange(6), seed=4).noisy, probe.noisy)
    assert not np.array_equal(make_probe(Halving(), images, np.arange(6), seed=5).noise, probe.noise)


def test_output_quality_by_hand(probe):
    fp = torch_student(Halving(), batch=4)(probe)
    found = output_quality(probe, fp, torch_student(Halving(error=0.25), batch=4)(probe))
    x = probe.noisy.astype(np.float64)
    power = [float((x[i] ** 2).sum()) / 4 for i in range(6)]
    error = 6 * 0.25**2  # of one image with t ≥ 50, six numbers
    assert found.output_mse == pytest.approx(3 * error / sum(power), rel=1e-6)
    assert found.per_range == pytest.approx((0, 0, error / power[3], 2 * error / (power[4] + power[5])), rel=1e-6)
    assert found.loss_fp == pytest.approx(float(np.mean((x / 2 - probe.noise) ** 2)), rel=1e-6)
    late = (probe.t >= 50)[:, None, None, None] * 0.25
    assert found.loss == pytest.approx(float(np.mean((x / 2 + late - probe.noise) ** 2)), rel=1e-6)
    assert (found.samples, found.to_json()["n"]) == (6, 6)
    same = output_quality(probe, fp, fp)
    assert same.output_mse == 0
    assert same.loss == same.loss_fp


def test_mutation_a_doubled_output_shows(probe):
    fp = torch_student(Halving())(probe)
    assert output_quality(probe, fp, 2 * fp).output_mse == pytest.approx(1)


def test_a_bundle_is_asked_one_timestep_at_a_time(probe):
    backend = Backend(error=0.25)
    found = runtime_student(Player(PLAN, backend), SPEC)(probe)
    np.testing.assert_allclose(found, torch_student(Halving(error=0.25))(probe), atol=1e-7)
    assert backend.calls == len(set(probe.t.tolist()))


def test_trajectories_by_hand():
    labels = np.array([0, 1, 2])
    reference = play_trajectories(Player(PLAN, Backend()), SPEC, labels, seed=2, batch=2)
    drifting = play_trajectories(Player(PLAN, Backend(drift=0.5)), SPEC, labels, seed=2)
    assert reference.states.shape == (3, 3, 2, 1, 3)
    np.testing.assert_array_equal(reference.images, reference.states[-1])
    found = trajectory_quality(reference, drifting)
    start = reference.states[0] - labels[:, None, None, None]
    first = np.linalg.norm(0.5 * start) / np.linalg.norm(reference.states[0])
    assert found.per_step[0] == pytest.approx(first, rel=1e-5)
    assert found.trajectory_error == found.per_step[-1] > found.per_step[0]
    assert found.to_json()["n"] == 3
    assert trajectory_quality(reference, reference).trajectory_error == 0


def test_what_cannot_be_compared_is_refused(probe):
    with pytest.raises(InputError, match="0 images and 0 labels"):
        make_probe(Halving(), np.zeros((0, 3, 4, 4), np.float32), np.zeros(0))
    with pytest.raises(InputError, match="one label each"):
        make_probe(Halving(), np.zeros((2, 3, 4, 4), np.float32), np.zeros(1))
    with pytest.raises(InputError, match="shape"):
        output_quality(probe, probe.noise, probe.noise[:1])
    one = Trajectories(np.zeros((1, 1, 1, 1, 1)), np.zeros((1, 3, 1, 1)))
    with pytest.raises(InputError, match="cannot be compared"):
        trajectory_quality(one, Trajectories(np.zeros((2, 1, 1, 1, 1)), one.images))
