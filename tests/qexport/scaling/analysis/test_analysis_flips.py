"""What a draw makes of an error, against cases worked by hand and NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import special

from qexport.compare import make_judge
from qexport.errors import UnsupportedError
from qexport.scaling.analysis.flips import Draws, codebook, compare_draws, flips
from qexport.scaling.analysis.moderators import DENOISER_SETTINGS, TOKEN_SETTINGS, moderated, settings_of
from qexport.scaling.analysis.subject import rounded


@pytest.fixture(scope="module")
def drawn(var):
    return {bits: flips(var, rounded(var, bits), samples=4) for bits in (4, 2)}


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_columns_by_hand():
    """Two codes at 0 and 3 on a line, probabilities (3/4, 1/4) and (1/2, 1/2), tokens 0 and 1."""
    logits = torch.log(torch.tensor([[[0.75, 0.25]]]))
    found = torch.log(torch.tensor([[[0.5, 0.5]]])) + 7  # a constant changes nothing
    codes = torch.tensor([[0.0], [3.0]])
    rows = compare_draws(logits, found, torch.tensor([[0]]), torch.tensor([[1]]), codes, rng())
    assert float(rows["kl"]) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)
    assert float(rows["tv"]) == pytest.approx(0.25)
    assert float(rows["flip"]) == 1
    assert float(rows["hard"]) == 9
    assert float(rows["soft"]) == pytest.approx(0.75**2), "the mean code moves from 0.75 to 1.5"
    assert float(rows["code"]) == 0
    assert float(rows["mean"]) == pytest.approx(0.75**2)
    assert float(rows["logit_error"]) == pytest.approx(1, rel=1e-5), "uniform logits are zero when centred"


def test_the_race_draws_from_the_distribution_and_flips_little():
    """Frequencies are those of the distribution; flips lie between TV and 2 TV / (1 + TV) (Daliri et al. 2024)."""
    generator = np.random.default_rng(0)
    one, other = (np.broadcast_to(generator.normal(0, 1, 8) * s, (1, 40000, 8)) for s in (1.0, 0.8))
    logits, found = torch.tensor(np.array(one)).float(), torch.tensor(np.array(one) + 0.2 * np.array(other)).float()
    tokens = torch.zeros(1, 40000, dtype=torch.int64)
    codes = torch.eye(8)
    rows = compare_draws(logits, found, tokens, tokens, codes, rng())
    tv = float(rows["tv"].mean())
    share = float(rows["race_flip"].mean())
    slack = 4 * (0.25 / 40000) ** 0.5
    assert tv - slack <= share <= 2 * tv / (1 + tv) + slack
    assert tv > 0.02
    assert float(rows["race_hard"].mean()) == pytest.approx(2 * share, rel=1e-5), "two unit vectors are √2 apart"


def test_divergence_is_that_of_scipy(var):
    """The first token depends on the class alone: its logits are those under teacher forcing, whatever the tokens."""
    quantised = rounded(var, 4)
    found = flips(var, quantised, samples=4, inputs={"top_k": 0, "top_p": 0.0, "cfg": 0.0})
    labels, tokens = torch.arange(4), torch.zeros(4, 155, dtype=torch.int64)
    first = [g.quality.teacher_forced_logits(labels, tokens)[:, 0].double().numpy() for g in (var, quantised)]
    wanted = special.rel_entr(*(special.softmax(logits, -1) for logits in first)).sum(-1)
    assert found.columns["kl"][found.call == 0] == pytest.approx(wanted, rel=1e-3)
    # Later calls read the full-precision model's keys and values, so they err less than under teacher forcing.
    judged = make_judge(var, samples=4)(quantised, False)["kl"]
    assert 0.8 * judged < found.columns["kl"].mean() < judged
    logits, other = (torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    rows = compare_draws(
        logits, other, torch.zeros(1, 5, dtype=int), torch.zeros(1, 5, dtype=int), torch.eye(16), rng()
    )
    p, q = special.softmax(logits.double().numpy(), -1), special.softmax(other.double().numpy(), -1)
    assert rows["kl"].numpy() == pytest.approx(special.rel_entr(p, q).sum(-1), rel=1e-4)


def test_equal_models_flip_nothing(var):
    found = flips(var, copy.deepcopy(var), samples=2).overall()
    for name in ("kl", "flip", "race_flip", "hard", "race_hard", "soft", "logit_error"):
        assert found[name] == 0


def test_fewer_bits_flip_more(drawn):
    few, many = drawn[2].overall(), drawn[4].overall()
    for name in ("kl", "tv", "flip", "race_flip", "hard", "race_hard", "soft", "logit_error"):
        assert few[name] > many[name]
    for one in (few, many):
        assert one["tv"] < one["race_flip"] < one["flip"]


def test_bins_and_calls_hold_every_draw_once(drawn):
    draws = drawn[4]
    assert [row["draws"] for row in draws.per_call()] == [4 * side * side for side in (1, 2, 3, 4, 5, 6, 8)]
    bins = draws.by_error()
    assert sum(row["draws"] for row in bins) == 4 * 155
    assert [row["kl"] for row in bins] == sorted(row["kl"] for row in bins)
    mean = sum(row["kl"] * row["draws"] for row in bins) / (4 * 155)
    assert mean == pytest.approx(draws.overall()["kl"])


def test_relative_errors_are_ratios_of_means():
    names = ("kl", "tv", "logit_error", "flip", "hard", "soft", "code", "mean", "race_flip", "race_hard", "race_code")
    columns = {name: np.array([1.0, 3.0]) for name in names} | {"code": np.array([2.0, 6.0])}
    found = Draws(np.array([0, 0]), columns, 1).overall()
    assert found["hard"] == 0.5
    assert found["soft"] == 1


def test_the_codebook_is_that_of_the_checkpoint(var):
    from support import checkpoint

    wanted = checkpoint("vqvae-c10")["quantize.embedding.weight"].float()
    assert torch.equal(codebook(var, 4096), wanted)
    with pytest.raises(UnsupportedError, match="0 tables with 17 rows"):
        codebook(var, 17)


def test_settings_fit_the_model(var, dit):
    assert settings_of(var) == TOKEN_SETTINGS
    assert settings_of(dit) == DENOISER_SETTINGS


def test_greedy_draws_flip_where_the_best_token_changes(var):
    found = moderated(var, rounded(var, 4), {"cfg": 0.0, "top_k": 1, "top_p": 0.0}, samples=2, images=0)
    drawn = moderated(var, rounded(var, 4), {"cfg": 0.0, "top_k": 0, "top_p": 0.0}, samples=2, images=0)
    assert 0 < found["flip"] < drawn["flip"]
    assert "fd" not in found
