"""The control: k-means against SciPy, the sampler against the plan's own DDIM, and the ways through the codebook."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.cluster.vq import vq

from qexport.auto.sensitivity import Sensitivity
from qexport.compare import make_judge
from qexport.errors import UnsupportedError
from qexport.family import find_model
from qexport.formats import get_format
from qexport.pipeline import load_generator
from qexport.reference import torch_player
from qexport.runtime.noise import NoiseStream
from qexport.scaling import figures
from qexport.scaling.analysis.codebook import Codebook
from qexport.scaling.analysis.kinds import FORMATS, Layer, sensitivity_of_kinds, summed
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
        assert not found.error.value.any()
        assert not found.flip.value.any()


def test_rounding_is_seen_on_every_way(dit, book):
    quantised = rounded(dit, 3)
    found = {control.way: control for control in controls(dit, quantised, book, samples=2, batch=1)}
    ends = {way: control.error.value for way, control in found.items()}
    assert np.array_equal(ends[NONE], found[NONE].before.value)
    assert np.array_equal(ends[END][:-1], ends[NONE][:-1])
    assert all(0 < end[-1] < 2 for end in ends.values())
    assert 0 < found[EACH].flip.value[-1] < 1
    # By hand, image by image: a resample that holds one image only has its error.
    for image in range(2):
        first = torch.from_numpy(NoiseStream(0, image, 1).draw("normal", (4, 16, 16)))
        labels = torch.tensor([image])
        wanted, other = (sample(g.denoise.model, first, labels, book, EACH) for g in (dit, quantised))
        only = figures.draws(2)[:, image] == 2
        single = float((other[1][-1] - wanted[1][-1]).norm() / wanted[1][-1].norm())
        assert found[EACH].error.samples[only][0, -1] == pytest.approx(single, rel=1e-4)
        differ = float((book.indices(other[0][-1]) != book.indices(wanted[0][-1])).double().mean())
        assert found[EACH].flip.samples[only][0, -1] == pytest.approx(differ)
    over = found[EACH].over_continuous
    assert over.samples == pytest.approx(found[EACH].error.samples[:, -1] / found[NONE].error.samples[:, -1])
    assert found[NONE].over_continuous.ci95 == pytest.approx([1, 1])


def test_decoded_images_are_those_of_the_plan(dit, book):
    (images,) = decoded(dit, book, NONE, images=2)
    player = torch_player(dit).with_schedule(f"ddim-{STEPS}")
    wanted = player.play({"label": np.array([0, 1]), "cfg": 1.0, "eta": 0.0})
    assert np.abs(images - wanted).max() < 1e-2


def test_a_model_that_draws_has_no_control(book):
    family, entry = find_model("var-c10-d2")
    with pytest.raises(UnsupportedError, match="does not denoise"):
        controls(family.load(entry, None, None), family.load(entry, None, None), book, samples=1)


def layer_row(layer: str, cost: float = 0.0) -> Sensitivity:
    return Sensitivity(layer, TensorSpec(get_format("int4"), PerGroup(32)), 100, 400, cost, 0.1, measured=True)


def test_kinds_add_up():
    """Two images, of which the second has twice the power; costs of layers worked by hand."""
    power = np.array([1.0, 2.0])
    layers = [
        Layer(layer_row(layer), np.array(errors), power)
        for layer, errors in (
            ("blocks.0.fc", [1e-3, 2e-3]),
            ("blocks.1.fc", [3e-3, 6e-3]),
            ("blocks.0.proj", [6e-3, 0.0]),
        )
    ]
    found = {kind.kind: kind for kind in summed(layers)}
    fc, proj = found["blocks.*.fc"], found["blocks.*.proj"]
    assert fc.cost.value == pytest.approx(4e-3)
    assert fc.weights == 200
    assert fc.cost.ci95 == pytest.approx([4e-3, 4e-3]), "both images cost the same"
    assert proj.cost.value == pytest.approx(2e-3)
    assert proj.cost.ci95 == pytest.approx([0, 6e-3])
    assert fc.to_json()["cost_per_million"]["value"] == pytest.approx(20)
    assert proj.share.value == pytest.approx(1 / 3, rel=1e-6)
    # Weight by weight both cost 20 a million: what comes first is not told apart.
    first = next(iter(found.values()))
    assert first.over_next is not None
    assert first.over_next.value == pytest.approx(1)
    low, high = first.over_next.ci95
    assert low < 1 < high


def test_costs_of_kinds_are_the_judges(dit):
    """The terms image by image give the cost that the sensitivity of layers has, for a model of each kind."""
    for full in (dit, load_generator("var-c10-d2")):
        few = replace(full, layers=dict(list(full.layers.items())[:1]), default_layers=list(full.layers)[:1])
        kinds, layers = sensitivity_of_kinds(few, make_judge(full, samples=3, per_image=True))
        assert len(layers) == len(FORMATS) == len(kinds)
        for kind, layer in zip(kinds, layers, strict=True):
            assert kind.cost.value == pytest.approx(layer.row.cost, rel=1e-4)
            assert kind.cost.images == 3
            assert kind.share.value == 1


def one(value: float) -> dict[str, object]:
    return {"value": value, "ci95": [0.5 * value, 2 * value], "n": 2}


def estimated(values: list[float]) -> dict[str, object]:
    return {"value": values, "ci95": [[0.5 * value, 2 * value] for value in values], "n": 2}


def test_bands_are_the_intervals():
    found = {"way": "each", "error": estimated([1.0, 0.5]), "flip": estimated([0.25, 0.5])}
    axes = control_figure([found], "W4").axes[1]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 0.125), (1, 0.5), (2, 0.25), (2, 1)}
    bars = kinds_figure({"var": [{"kind": "fc", "format": "int4", "cost_per_million": one(0.2)}]}).axes[0].collections
    assert bars[0].get_paths()[0].vertices[:, 0] == pytest.approx([0.1, 0.4])


def test_figures_are_written_and_repeat(tmp_path):
    pairs = estimated([0.1, 0.2])
    blocks = {"value": [[0.1, 0.2], [0.3, 0.0]], "ci95": [[[0.0, 0.2], [0.1, 0.3]], [[0.2, 0.4], [0.0, 0.0]]]}
    middle = {"forced": blocks, "free": blocks}
    middle |= {f"{way}_{what}": pairs for way in ("forced", "free") for what in ("output", "state")}
    row = {name: one(0.1) for name in ("kl", "flip", "race_flip", "tv", "race_hard", "soft")}
    flipped = {"4": {"by_error": [row, row | {"kl": one(0.2)}], "per_call": [row, row]}}
    kind = {"kind": "blocks.*.fc", "format": "int4", "cost_per_million": one(0.1)}
    control = {"way": "each", "error": pairs, "flip": pairs}
    made = {
        "middle": lambda: middle_figure(middle, "scale"),
        "widths": lambda: widths_figure({"4": middle, "2": middle}, "scale"),
        "flips": lambda: flips_figure(flipped),
        "control": lambda: control_figure([control], "W4"),
        "kinds": lambda: kinds_figure({"var": [kind], "dit": [kind], "larger": [kind]}),
    }
    for name, make in made.items():
        save(make(), tmp_path / name)
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    save(made["kinds"](), tmp_path / "again")
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"kinds{suffix}").read_bytes()
