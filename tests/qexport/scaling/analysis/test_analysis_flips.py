"""What a draw makes of an error, against cases worked by hand and NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import special

from qexport.compare import make_judge
from qexport.errors import UnsupportedError
from qexport.reference import torch_player
from qexport.scaling import figures
from qexport.scaling.analysis.draws import COLUMNS, KL_EDGES, Draws, at_equal_kl
from qexport.scaling.analysis.flips import codebook, compare_draws, flips
from qexport.scaling.analysis.moderators import (
    DENOISER_SETTINGS,
    TOKEN_SETTINGS,
    fd_difference,
    moderated,
    moderator_rows,
    settings_of,
)
from qexport.scaling.analysis.subject import rounded
from qexport.verify.denoise_quality import play_trajectories, trajectory_quality
from qexport.verify.fd import FrechetResult


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
        assert found[name].value == 0
        assert not found[name].samples.any()


def test_fewer_bits_flip_more(drawn):
    few, many = drawn[2].overall(), drawn[4].overall()
    for name in ("kl", "tv", "flip", "race_flip", "hard", "race_hard", "soft", "logit_error"):
        assert few[name].value > many[name].value
    for one in (few, many):
        assert one["tv"].value < one["race_flip"].value < one["flip"].value


def test_bins_and_calls_hold_every_draw_once(drawn):
    draws = drawn[4]
    assert [row["draws"].value for row in draws.per_call()] == [4 * side * side for side in (1, 2, 3, 4, 5, 6, 8)]
    bins = [{name: float(figure.value) for name, figure in row.items()} for row in draws.by_error()]
    assert sum(row["draws"] for row in bins) == pytest.approx(4 * 155)
    assert [row["kl"] for row in bins] == sorted(row["kl"] for row in bins)
    mean = sum(row["kl"] * row["draws"] for row in bins) / (4 * 155)
    assert mean == pytest.approx(draws.overall()["kl"].value)


def test_relative_errors_are_ratios_of_means():
    columns = {name: np.array([1.0, 3.0]) for name in COLUMNS} | {"code": np.array([2.0, 6.0])}
    found = Draws(np.array([0, 0]), np.array([0, 0]), columns, 1).overall()
    assert found["hard"].value == 0.5
    assert found["soft"].value == 1


def test_draws_belong_to_their_image(var):
    """In batches of one, the image is the batch."""
    quantised = rounded(var, 3)
    together, apart = (flips(var, quantised, samples=2, batch=batch) for batch in (2, 1))
    assert np.bincount(together.image).tolist() == [155, 155]
    for image in range(2):
        one, other = (found.columns["kl"][found.image == image] for found in (together, apart))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


def made_up(seed: int, images: int = 6, shift: float = 0.0) -> Draws:
    """Draws of which images have different numbers, and KL and flips that depend on the image."""
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), np.arange(5, 5 + 10 * images, 10))
    columns = {name: generator.uniform(0.1, 1, len(image)) for name in COLUMNS}
    columns["kl"] = np.exp(generator.normal(-3 + 0.3 * image + shift, 0.5))
    columns["race_flip"] = (generator.uniform(size=len(image)) < np.minimum(3 * columns["kl"], 1)).astype(float)
    return Draws(generator.integers(0, 2, len(image)), image, columns, images)


def test_images_are_resampled_with_all_their_draws():
    """Against NumPy: the table is put together anew, row by row, for every resample."""
    draws = made_up(0)
    calls, bins = draws.per_call(), draws.by_error()
    order = np.argsort(draws.columns["kl"], kind="stable")
    third = np.array_split(order, 10)[3]
    for resample, counts in enumerate(figures.draws(6)[:20]):
        rows = np.concatenate([np.repeat(np.flatnonzero(draws.image == i), int(n)) for i, n in enumerate(counts)])
        table = {name: column[rows] for name, column in draws.columns.items()}
        second = draws.call[rows] == 1
        assert calls[1]["kl"].samples[resample] == pytest.approx(table["kl"][second].mean())
        wanted = table["race_hard"][second].mean() / table["soft"][second].mean()
        assert calls[1]["race_hard_over_soft"].samples[resample] == pytest.approx(wanted)
        inside = np.isin(rows, third)
        if inside.any():
            assert bins[3]["race_flip"].samples[resample] == pytest.approx(table["race_flip"][inside].mean())
        else:
            assert np.isnan(bins[3]["race_flip"].samples[resample])


def test_intervals_are_wider_than_if_draws_were_independent():
    """The mutation that this guards against: resampling draws instead of images."""
    found = made_up(0, images=20)
    low, high = found.overall()["kl"].ci95
    column = found.columns["kl"]
    generator = np.random.default_rng(0)
    apart = [generator.choice(column, len(column)).mean() for _ in range(1000)]
    assert high - low > 2 * np.subtract(*np.percentile(apart, [97.5, 2.5]))


def test_flips_at_equal_divergence_are_those_of_mantel_and_haenszel():
    one, other = made_up(1), made_up(2, shift=0.7)
    found = at_equal_kl(one, other)
    above = below = 0.0
    for low, high in zip([0, *KL_EDGES], [*KL_EDGES, np.inf], strict=True):
        here, there = ((d.columns["kl"] >= low) & (d.columns["kl"] < high) for d in (one, other))
        n, m = here.sum(), there.sum()
        if n and m:
            rates = other.columns["race_flip"][there].mean() - one.columns["race_flip"][here].mean()
            above, below = above + rates * n * m / (n + m), below + n * m / (n + m)
    assert found.value == pytest.approx(above / below)
    low, high = found.ci95
    assert low < 0 < high, "the chance of a flip depends on the KL alone"
    assert at_equal_kl(one, one).samples == pytest.approx(0)


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
    found = moderated(var, rounded(var, 4), {"cfg": 0.0, "top_k": 1, "top_p": 0.0}, samples=2)
    drawn = moderated(var, rounded(var, 4), {"cfg": 0.0, "top_k": 0, "top_p": 0.0}, samples=2)
    assert 0 < found["flip"].value < drawn["flip"].value


def test_rows_of_settings_tell_changes_from_the_first(dit):
    quantised = rounded(dit, 3)
    rows = list(moderator_rows(dit, {"W3": quantised}, samples=2, images=0))
    assert [row["settings"] for row in rows] == list(DENOISER_SETTINGS)
    assert rows[0]["W3"]["change"]["trajectory_error"]["ci95"] == [0, 0]
    labels = np.arange(2)
    for row in (rows[0], rows[-1]):
        ends = [play_trajectories(torch_player(g), g.denoise, labels, inputs=row["settings"]) for g in (dit, quantised)]
        wanted = trajectory_quality(*ends).trajectory_error
        assert row["W3"]["trajectory_error"]["value"] == pytest.approx(wanted, rel=1e-3)
    one, other = (row["W3"]["trajectory_error"]["value"] for row in (rows[-1], rows[0]))
    assert rows[-1]["W3"]["change"]["trajectory_error"]["value"] == pytest.approx(one - other, rel=1e-3)
    assert "fd" not in rows[0]["W3"]


def test_differences_of_fd_add_their_spreads_in_squares():
    one, other = (
        FrechetResult("features", value, value - half, value + half, 100, 0) for value, half in ((5, 3), (2, 4))
    )
    assert fd_difference(one, other) == {"value": 3, "ci95": [-2, 8], "n": 100}
    assert fd_difference(one, one)["ci95"] == [0, 0]
