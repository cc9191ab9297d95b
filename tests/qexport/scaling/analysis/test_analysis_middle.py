"""Errors of middle representations against the modules called by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny_shared_aln

from qexport.errors import UnsupportedError
from qexport.scaling import figures
from qexport.scaling.analysis.middle import middle_errors
from qexport.scaling.analysis.streams import Streams
from qexport.scaling.analysis.subject import rounded, subject_of
from qexport.verify.denoise_quality import play_trajectories, trajectory_quality


def test_a_model_does_not_differ_from_itself(var):
    found = middle_errors(var, copy.deepcopy(var), samples=2)
    assert found.forced.value.shape == (7, 2)
    for each in (found.forced, found.free, found.free_state):
        assert not each.value.any()
        assert not each.samples.any()


def test_only_what_follows_a_changed_block_differs(var):
    """The last block doubled in one matrix: the first block is untouched when forced, and moved by what was drawn."""
    changed = copy.deepcopy(var)
    with torch.no_grad():
        changed.graph("step").parameters()["blocks.1.ffn.fc2.weight"].mul_(2)
    found = middle_errors(var, changed, samples=2)
    forced, free = found.forced.value, found.free.value
    assert not forced[:, 0].any()
    assert (forced[:, 1] > 0.01).all()
    assert free[0, 0] == 0, "nothing was drawn before the first scale"
    assert free[-1, 0] > 0


@torch.no_grad()
def test_the_first_call_is_that_of_the_modules_called_by_hand(dit):
    quantised = rounded(dit, 2)
    found = middle_errors(dit, quantised, samples=3, inputs={"cfg": 1.0})
    from qexport.runtime.noise import NoiseStream

    x = torch.from_numpy(NoiseStream(0, 0, 3).draw("normal", (4, 16, 16)))
    row = torch.from_numpy(dit.tables["schedule.ddpm-50"][0])
    states = []
    for generator in (dit, quantised):
        step = generator.graph("denoise").module
        tokens, condition = step.embed(torch.arange(3), x, row)
        outputs = []
        for block in step.blocks:
            tokens = block(tokens, condition)
            outputs.append(tokens.double())
        states.append(outputs)
    for block, (ours, theirs) in enumerate(zip(*states, strict=True)):
        wanted = float((theirs - ours).norm() / ours.norm())
        assert found.forced.value[0, block] == pytest.approx(wanted, rel=1e-5)
        assert found.free.value[0, block] == pytest.approx(wanted, rel=1e-5), "both begin with the same noise"
        # The step puts the images without their class behind those with it.
        by_image = [x.square().sum((1, 2)).reshape(2, 3).sum(0).numpy() for x in (theirs - ours, ours)]
        error_R, power_R = (figures.draws(3) @ column for column in by_image)
        assert found.forced.samples[:, 0, block] == pytest.approx(np.sqrt(error_R / power_R), rel=1e-4)
    assert found.forced.value[0, 0] > 0.01


def test_free_states_are_those_of_the_trajectory_quality(dit):
    quantised = rounded(dit, 3)
    found = middle_errors(dit, quantised, samples=2)
    from qexport.reference import torch_player

    labels = np.arange(2)
    ends = [play_trajectories(torch_player(g), g.denoise, labels) for g in (dit, quantised)]
    assert found.free_state.value == pytest.approx(trajectory_quality(*ends).per_step, rel=1e-4)
    single = [float(np.linalg.norm(ends[1].states[-1, i] - ends[0].states[-1, i])) for i in range(2)]
    single = [one / float(np.linalg.norm(ends[0].states[-1, i])) for i, one in enumerate(single)]
    assert found.free_state[-1].ci95 == pytest.approx(sorted(single), rel=1e-4), (
        "a quarter of resamples has one image only"
    )


def test_batches_do_not_matter(var):
    quantised = rounded(var, 4)
    one, two = (middle_errors(var, quantised, samples=3, batch=batch) for batch in (3, 2))
    # Wider products may sum in another order: 1e-6 of what flows, beside errors of 5e-2.
    assert one.forced.value == pytest.approx(two.forced.value, rel=1e-3)
    assert one.forced.samples == pytest.approx(two.forced.samples, rel=1e-3), "images keep their places"
    assert one.free_state.images == 3


def test_guided_rows_belong_to_their_image(dit):
    """Blocks see every image twice when guided; one image's errors are those that it has alone."""
    quantised = rounded(dit, 3)
    both = middle_errors(dit, quantised, samples=2)
    alone = middle_errors(dit, quantised, samples=1)
    counts = figures.draws(2)
    only_first = both.forced.samples[counts[:, 0] == 2]
    assert only_first[0] == pytest.approx(alone.forced.value, rel=1e-3)
    assert only_first[0] != pytest.approx(both.forced.value, rel=1e-3)


def test_ratios_are_those_of_the_errors_resample_by_resample(var):
    found = middle_errors(var, rounded(var, 4), samples=3)
    ratios = found.ratios()
    assert ratios["depth"].value == pytest.approx(found.forced.value[:, 1] / found.forced.value[:, 0])
    assert ratios["depth"].samples == pytest.approx(found.forced.samples[:, :, 1] / found.forced.samples[:, :, 0])
    for name, error in (("output_over_first", found.forced_output), ("state_over_first", found.forced_state)):
        inside = (error.samples[:, 0] > 0)[:, None] & np.ones(7, np.bool_)  # the first token of few images flips
        assert ratios[name].samples[inside] == pytest.approx((error.samples / error.samples[:, :1].clip(1e-30))[inside])
    assert ratios["output_over_first"][0].ci95 == pytest.approx([1, 1])
    written = found.to_json()
    assert np.array(written["forced"]["ci95"]).shape == (7, 2, 2)
    assert written["forced"]["n"] == 3


def test_fewer_bits_err_more_and_the_model_stays(var):
    before = var.graph("step").parameters()["blocks.0.ffn.fc1.weight"].clone()
    errors = [middle_errors(var, rounded(var, bits), samples=1).forced.value.mean() for bits in (8, 4, 2)]
    assert errors[0] < 0.2 * errors[1] < 0.2 * errors[2]
    assert torch.equal(before, var.graph("step").parameters()["blocks.0.ffn.fc1.weight"])


def test_hooks_are_gone_afterwards(var):
    subject = subject_of(var)
    with Streams(subject) as streams:
        assert all(block._forward_hooks for block in streams.blocks)
    assert not any(block._forward_hooks for block in streams.blocks)


def test_other_members_of_a_family_are_understood():
    found = middle_errors(tiny_shared_aln(), tiny_shared_aln(), samples=2)
    assert found.forced.value.shape == (3, 2)


def test_a_model_that_neither_draws_nor_denoises_is_refused(var):
    from dataclasses import replace

    with pytest.raises(UnsupportedError, match="neither draws tokens nor denoises"):
        subject_of(replace(var, draw=None))
