"""The control: k-means against SciPy, the sampler against the plan's own DDIM, and the ways through the codebook."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.cluster.vq import vq

from qexport.auto.sensitivity import Sensitivity
from qexport.errors import UnsupportedError
from qexport.family import find_model
from qexport.formats import get_format
from qexport.reference import torch_player
from qexport.runtime.noise import NoiseStream
from qexport.scaling.analysis.codebook import Codebook
from qexport.scaling.analysis.kinds import summed
from qexport.scaling.analysis.plots import (
    control_figure,
    flips_figure,
    kinds_figure,
    middle_figure,
    save,
    widths_figure,
)
from qexport.scaling.analysis.rediscretise import EACH, END, NONE, STEPS, controls, decoded, sample, timesteps_of
from qexport.scaling.analysis.subject import rounded
from qexport.scheme import PerGroup, TensorSpec
from qexport.verify.denoise_quality import play_trajectories


@pytest.fixture(scope="module")
def book():
    return Codebook.of_latents(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 32)


def test_nearest_codes_are_those_of_scipy(book):
    latents = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    wanted, distance = vq(latents.permute(0, 2, 3, 1).reshape(-1, 4).numpy(), book.codes_KC.numpy())
    assert book.indices(latents).flatten().tolist() == wanted.tolist()
    found = float((book.snap(latents) - latents).square().sum())
    assert found == pytest.approx(float(np.square(distance).sum()), rel=1e-4)
    assert torch.equal(book.snap(book.snap(latents)), book.snap(latents))


def test_clusters_that_are_there_are_found():
    centres = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, -5, 0]])
    rng = torch.Generator().manual_seed(0)
    chosen = centres[torch.randint(3, (20, 8, 8), generator=rng)] + 0.1 * torch.randn(20, 8, 8, 4, generator=rng)
    found = Codebook.of_latents(chosen.permute(0, 3, 1, 2), 3, seed=1).codes_KC
    assert torch.cdist(centres, found).min(dim=1).values.max() < 0.05
    assert Codebook(torch.zeros(1, 4)).distortion(chosen.permute(0, 3, 1, 2)) == pytest.approx(1)


def test_more_codes_distort_less():
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    distortions = [Codebook.of_latents(latents, count).distortion(latents) for count in (4, 32, 256)]
    assert distortions == sorted(distortions, reverse=True)


def test_the_continuous_way_is_the_plans_own_sampler(dit, book):
    """DDIM of 25 steps without guidance, from the schedule's table and the exported step: another path altogether."""
    labels = np.array([1, 8])
    player = torch_player(dit).with_schedule(f"ddim-{STEPS}")
    wanted = play_trajectories(player, dit.denoise, labels, inputs={"cfg": 1.0, "eta": 0.0})
    first = torch.from_numpy(NoiseStream(0, 0, 2).draw("normal", (4, 16, 16)))
    _, used = sample(dit.denoise.model, first, torch.from_numpy(labels), book, NONE)
    last = torch.from_numpy(wanted.states[-1])  # after the last step the state is x̂₀
    assert float((used[-1] - last).norm() / last.norm()) < 1e-3


def test_timesteps_are_those_of_the_schedule(dit):
    assert timesteps_of(dit.denoise.model) == dit.tables[f"schedule.ddim-{STEPS}"][:, 0].astype(int).tolist()


def test_ways_differ_where_they_say(dit, book):
    first = torch.from_numpy(NoiseStream(0, 0, 1).draw("normal", (4, 16, 16)))
    labels = torch.tensor([3])
    ways = {way: sample(dit.denoise.model, first, labels, book, way) for way in (NONE, END, EACH)}
    assert all(torch.equal(a, b) for a, b in zip(*ways[NONE], strict=True))
    assert torch.equal(ways[END][1][-1], book.snap(ways[NONE][0][-1]))
    assert all(torch.equal(a, b) for a, b in zip(ways[END][1][:-1], ways[NONE][1][:-1], strict=True))
    assert all(torch.equal(used, book.snap(clean)) for clean, used in zip(*ways[EACH], strict=True))
    assert not torch.equal(ways[EACH][0][-1], ways[NONE][0][-1])


def test_equal_models_stay_together_on_every_way(dit, book):
    for found in controls(dit, copy.deepcopy(dit), book, samples=1):
        assert not any(found.error)
        assert not any(found.flip)


def test_rounding_is_seen_on_every_way(dit, book):
    found = {control.way: control for control in controls(dit, rounded(dit, 3), book, samples=2, batch=1)}
    assert found[NONE].error == found[NONE].before
    assert found[END].error[:-1] == found[NONE].error[:-1]
    assert all(0 < control.error[-1] < 2 for control in found.values())
    assert 0 < found[EACH].flip[-1] < 1


def test_decoded_images_are_those_of_the_plan(dit, book):
    (images,) = decoded(dit, book, NONE, images=2)
    player = torch_player(dit).with_schedule(f"ddim-{STEPS}")
    wanted = player.play({"label": np.array([0, 1]), "cfg": 1.0, "eta": 0.0})
    assert np.abs(images - wanted).max() < 1e-2


def test_a_model_that_draws_has_no_control(book):
    family, entry = find_model("var-c10-d2")
    with pytest.raises(UnsupportedError, match="does not denoise"):
        controls(family.load(entry, None, None), family.load(entry, None, None), book, samples=1)


def test_kinds_add_up():
    spec = TensorSpec(get_format("int4"), PerGroup(32))
    rows = [
        Sensitivity(layer, spec, 100, 400, cost, 0.1, measured=True)
        for layer, cost in (("blocks.0.fc", 1e-3), ("blocks.1.fc", 3e-3), ("blocks.0.proj", 5e-3))
    ]
    found = {kind.kind: kind for kind in summed(rows)}
    assert set(found) == {"blocks.*.fc", "blocks.*.proj"}
    assert found["blocks.*.fc"].cost == pytest.approx(4e-3)
    assert found["blocks.*.fc"].weights == 200
    assert found["blocks.*.fc"].to_json()["cost_per_million"] == pytest.approx(20)


def test_figures_are_written_and_repeat(tmp_path):
    blocks = [[0.1, 0.2], [0.3, 0.0]]
    middle = {"forced": blocks, "free": blocks}
    middle |= {f"{way}_{what}": [0.1, 0.2] for way in ("forced", "free") for what in ("output", "state")}
    row = {"kl": 0.1, "flip": 0.5, "race_flip": 0.2, "tv": 0.1, "race_hard": 0.3, "soft": 0.01}
    flipped = {"4": {"by_error": [row, row | {"kl": 0.2}], "per_call": [row, row]}}
    kind = {"kind": "blocks.*.fc", "format": "int4", "cost_per_million": 0.1}
    figures = {
        "middle": lambda: middle_figure(middle, "scale"),
        "widths": lambda: widths_figure({"4": middle, "2": middle}, "scale"),
        "flips": lambda: flips_figure(flipped),
        "control": lambda: control_figure([{"way": "each", "error": [1.0, 0.5], "flip": [0.9, 0.5]}], "W4"),
        "kinds": lambda: kinds_figure({"var": [kind], "dit": [kind]}),
    }
    for name, make in figures.items():
        save(make(), tmp_path / name)
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    save(figures["kinds"](), tmp_path / "again")
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"kinds{suffix}").read_bytes()
