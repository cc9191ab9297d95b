"""Errors of middle representations against the modules called by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_models import tiny_shared_aln

from qexport.errors import UnsupportedError
from qexport.scaling.analysis.middle import middle_errors
from qexport.scaling.analysis.streams import Streams
from qexport.scaling.analysis.subject import rounded, subject_of
from qexport.verify.denoise_quality import play_trajectories, trajectory_quality


def test_a_model_does_not_differ_from_itself(var):
    found = middle_errors(var, copy.deepcopy(var), samples=2)
    assert found.forced.shape == (7, 2)
    assert not found.forced.any()
    assert not found.free.any()
    assert not found.free_state.any()


def test_only_what_follows_a_changed_block_differs(var):
    """The last block doubled in one matrix: the first block is untouched when forced, and moved by what was drawn."""
    changed = copy.deepcopy(var)
    with torch.no_grad():
        changed.graph("step").parameters()["blocks.1.ffn.fc2.weight"].mul_(2)
    found = middle_errors(var, changed, samples=2)
    assert not found.forced[:, 0].any()
    assert (found.forced[:, 1] > 0.01).all()
    assert found.free[0, 0] == 0, "nothing was drawn before the first scale"
    assert found.free[-1, 0] > 0


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
        assert found.forced[0, block] == pytest.approx(wanted, rel=1e-5)
        assert found.free[0, block] == pytest.approx(wanted, rel=1e-5), "both begin with the same noise"
    assert found.forced[0, 0] > 0.01


def test_free_states_are_those_of_the_trajectory_quality(dit):
    quantised = rounded(dit, 3)
    found = middle_errors(dit, quantised, samples=2)
    from qexport.reference import torch_player

    labels = np.arange(2)
    ends = [play_trajectories(torch_player(g), g.denoise, labels) for g in (dit, quantised)]
    assert found.free_state == pytest.approx(trajectory_quality(*ends).per_step, rel=1e-4)


def test_batches_do_not_matter(var):
    quantised = rounded(var, 4)
    one, two = (middle_errors(var, quantised, samples=3, batch=batch) for batch in (3, 2))
    # Wider products may sum in another order: 1e-6 of what flows, beside errors of 5e-2.
    assert one.forced == pytest.approx(two.forced, rel=1e-3)


def test_fewer_bits_err_more_and_the_model_stays(var):
    before = var.graph("step").parameters()["blocks.0.ffn.fc1.weight"].clone()
    errors = [middle_errors(var, rounded(var, bits), samples=1).forced.mean() for bits in (8, 4, 2)]
    assert errors[0] < 0.2 * errors[1] < 0.2 * errors[2]
    assert torch.equal(before, var.graph("step").parameters()["blocks.0.ffn.fc1.weight"])


def test_hooks_are_gone_afterwards(var):
    subject = subject_of(var)
    with Streams(subject) as streams:
        assert all(block._forward_hooks for block in streams.blocks)
    assert not any(block._forward_hooks for block in streams.blocks)


def test_other_members_of_a_family_are_understood():
    found = middle_errors(tiny_shared_aln(), tiny_shared_aln(), samples=2)
    assert found.forced.shape == (3, 2)


def test_a_model_that_neither_draws_nor_denoises_is_refused(var):
    from dataclasses import replace

    with pytest.raises(UnsupportedError, match="neither draws tokens nor denoises"):
        subject_of(replace(var, draw=None))
