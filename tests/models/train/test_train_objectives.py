"""The objectives against NumPy, SciPy, torch.distributions, and what the bundled models are known to score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from qexport_models.autoencoder_kl.config import KLVAE_C10
from qexport_models.checkpoints import BUNDLED
from qexport_models.dit.family import DiTQuality
from qexport_models.dit.schedule import make_schedule
from qexport_models.featurenet import load_featurenet
from qexport_models.train.dit import Bound, DiTTask, bin_log_mass, normal_kl
from qexport_models.train.featurenet import MOST_SHIFT, shifted
from qexport_models.train.perceptual import perceptual_distance
from qexport_models.train.recipe import KINDS, LAST_RATE, default_recipe
from qexport_models.train.task import LOSS, drop_labels
from qexport_models.train.trainer import judge
from qexport_models.train.var import VARTask
from qexport_models.train.vqvae import VQVAETask
from qexport_models.train.weights import make_task
from qexport_models.var.family import SCALES_32
from scipy import stats
from support import tensors

from qexport.errors import InputError
from qexport.numerics.metrics import cross_entropy

FLOAT32 = 1e-5
"""Relative: sums of some 10⁴ float32 terms in another order."""


def bundled(kind: str, depth: int = 2):
    name = {"vqvae": "vqvae-c10", "klvae": "klvae-c10", "featurenet": "featurenet"}.get(kind, f"{kind}-c10-d{depth}")
    task = make_task(default_recipe(kind, depth), init=BUNDLED / f"{name}.safetensors")
    task.module.eval()
    return task


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def test_var_is_scored_as_its_logits_say():
    fixture = tensors("zoo-expected-var")
    task = bundled("var")
    assert isinstance(task, VARTask)
    tokens = task.encode(fixture["images_u8"])
    assert torch.equal(tokens.long(), fixture["vqvae.tokens"])
    # Only six positions of two images are on record: score the positions that are.
    logits = task.module(fixture["labels"][:2], fixture["vqvae.teacher_forcing_input"][:2])
    positions = fixture["logit_positions"]
    recorded = cross_entropy(fixture["var-c10-d2.logits_at_positions"].numpy(), tokens[:2, positions].numpy())
    assert cross_entropy(logits[:, positions].numpy(), tokens[:2, positions].numpy()) == pytest.approx(recorded, 1e-5)
    wanted = cross_entropy(logits.numpy(), tokens[:2].numpy())
    found = task.terms(tokens[:2], fixture["labels"][:2], rng())[LOSS]
    assert float(found) == pytest.approx(wanted, rel=FLOAT32)
    assert 5 < wanted < 7.5, "6.17 on 500 test images"
    assert float(task.terms(tokens[:2].roll(1, dims=1), fixture["labels"][:2], rng())[LOSS]) > wanted + 0.5  # mutation


@torch.no_grad()
def test_dit_is_scored_as_the_quality_figures_say():
    images = tensors("zoo-expected-dit")["images_u8"]
    task = bundled("dit")
    assert isinstance(task, DiTTask)
    latents = task.encode(images)
    wanted = tensors("zoo-expected-dit")["klvae.moments"][:, :4] * KLVAE_C10.scaling_factor
    assert torch.allclose(latents, wanted, atol=1e-4)
    t, labels = 20 + torch.arange(8) * 139, torch.arange(8) % 10
    noise = torch.randn(latents.shape, generator=rng())
    quality = DiTQuality(task.module, task.vae)
    eps = quality.denoise(quality.add_noise(latents, noise, t), t, labels)[:, :4]
    independent = float(np.mean((eps.double().numpy() - noise.double().numpy()) ** 2))
    found = task.terms_at(latents, noise, t, labels)
    assert float(found["noise_mse"]) == pytest.approx(independent, rel=1e-4)
    assert float(found[LOSS]) == pytest.approx(independent + float(found["vlb_bits"]), rel=1e-4)
    assert 0 < float(found["vlb_bits"]) < 0.1, "the bundled model learned its variance with this bound"


@torch.no_grad()
def test_autoencoders_are_scored_as_their_recorded_reconstructions_are():
    fixture = tensors("zoo-expected-var")
    pixels = fixture["images_u8"]
    reconstruction, images = fixture["vqvae.reconstruction"].numpy(), pixels.float().numpy() / 127.5 - 1
    found = bundled("vqvae").terms(pixels, torch.zeros(8, dtype=torch.int64), rng())
    # The decoder's output is clamped in the record and not in the objective: only pixels beyond the range differ.
    assert float(found["l2"]) == pytest.approx(np.mean((reconstruction - images) ** 2), rel=0.02)
    fixture = tensors("zoo-expected-dit")
    recorded = fixture["klvae.decode_of_mean"].numpy() - (fixture["images_u8"].float().numpy() / 127.5 - 1)
    found = bundled("klvae").terms(fixture["images_u8"], torch.zeros(8, dtype=torch.int64), rng())
    assert float(found["l1"]) == pytest.approx(np.abs(recorded).mean(), rel=0.01)
    assert float(found["l2"]) == pytest.approx(np.square(recorded).mean(), rel=0.02)


@torch.no_grad()
def test_featurenet_is_scored_as_its_recorded_logits_are():
    fixture = tensors("zoo-expected-featurenet")
    labels = fixture["featurenet.logits"].argmax(dim=1)
    found = bundled("featurenet").terms(fixture["images_u8"], labels, rng())
    assert float(found["accuracy"]) == 1
    wanted = cross_entropy(fixture["featurenet.logits"].numpy(), labels.numpy())
    assert float(found[LOSS]) == pytest.approx(wanted, rel=1e-4)


def test_bound_is_the_divergence_of_the_two_posteriors():
    schedule, bound = make_schedule(), Bound()
    generator = rng()
    x0, noise, eps, v = (torch.randn(6, 4, 2, 2, generator=generator) for _ in range(4))
    t = torch.tensor([0, 1, 10, 300, 700, 999])
    xt = bound.noisy(x0, noise, t)
    found = bound.term(x0, xt, eps, v, t)
    for row, step in enumerate(t.tolist()):
        wide = {name: value[row].double().numpy() for name, value in (("x0", x0), ("xt", xt), ("eps", eps), ("v", v))}
        alpha = schedule.alphas_cumprod[step]
        guess = (wide["xt"] - np.sqrt(1 - alpha) * wide["eps"]) / np.sqrt(alpha)
        before = schedule.alphas_cumprod_prev[step]
        beta = schedule.betas[step]
        means = [
            (np.sqrt(before) * beta * clean + np.sqrt(1 - beta) * (1 - before) * wide["xt"]) / (1 - alpha)
            for clean in (wide["x0"], guess)
        ]
        low, high = schedule.posterior_log_variance_clipped[step], np.log(beta)
        deviation = np.exp(0.5 * ((wide["v"] + 1) / 2 * high + (1 - wide["v"]) / 2 * low))
        if step:
            p, q = (
                torch.distributions.Normal(torch.from_numpy(mean), torch.as_tensor(scale))
                for mean, scale in zip(means, (np.exp(0.5 * low), deviation), strict=True)
            )
            nats = torch.distributions.kl_divergence(p, q).numpy()
        else:
            ends = [stats.norm.cdf(wide["x0"] + sign / 255, means[1], deviation) for sign in (1, -1)]
            nats = -np.log(np.maximum(ends[0] - ends[1], 1e-12))
        assert float(found[row]) == pytest.approx(nats.mean() / np.log(2), rel=2e-3), f"t = {step}"


def test_bound_reaches_the_variance_only():
    task = bundled("dit")
    assert isinstance(task, DiTTask)
    final = task.module.final_layer.linear
    x = torch.randn(2, 4, 16, 16, generator=rng())
    found = task.terms_at(x, torch.randn(x.shape, generator=rng()), torch.tensor([100, 600]), torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(found["vlb_bits"], final.weight)
    by_channel = gradient.reshape(4, 8, -1).abs().sum(dim=(0, 2))  # patch pixels before channels
    assert (by_channel[:4] == 0).all()
    assert (by_channel[4:] > 0).all()


def test_normal_divergence_and_bin_mass_of_known_cases():
    zero, one = torch.zeros(()), torch.ones(())
    assert float(normal_kl(zero, zero, zero, zero)) == 0
    assert float(normal_kl(one, zero, zero, zero)) == pytest.approx(0.5)
    wanted = np.log(stats.norm.cdf(1 / 255) - stats.norm.cdf(-1 / 255))
    assert float(bin_log_mass(zero, zero, zero)) == pytest.approx(wanted, rel=1e-4)


def test_gradient_passes_the_choice_of_codes_straight_through():
    """Without the codebook terms, the encoder's features get exactly the gradient of the decoder's input."""
    task = bundled("vqvae")
    assert isinstance(task, VQVAETask)
    vae = task.module
    pixels = tensors("zoo-expected-var")["images_u8"][:1]
    kept: list[torch.Tensor] = []
    original = vae.encode
    vae.encode = lambda images: kept.append(original(images)) or kept[-1].retain_grad() or kept[-1]  # type: ignore
    found = task.terms(pixels, torch.zeros(1, dtype=torch.int64), rng())
    found["l2"].backward()
    f_hat = vae.quantize.f_hats(vae.quantize.tokenize(kept[0].detach()))[-1].detach().requires_grad_(True)
    reconstruction = vae.decoder(vae.post_quant_conv(f_hat))
    (reconstruction - (pixels.float() / 127.5 - 1)).square().mean().backward()
    assert f_hat.grad is not None
    assert kept[0].grad is not None
    assert float((kept[0].grad - f_hat.grad).norm() / f_hat.grad.norm()) < 1e-4


def test_dead_codes_are_put_onto_residuals_and_others_stay():
    task = bundled("vqvae")
    assert isinstance(task, VQVAETask)
    task.module.train()
    pixels = tensors("zoo-expected-var")["images_u8"]
    with torch.no_grad():
        task.terms(pixels, torch.zeros(8, dtype=torch.int64), rng())
    before = task.module.quantize.embedding.weight.detach().clone()
    used = torch.cat(task.module.tokenize(pixels.float() / 127.5 - 1), dim=1).unique()
    moved = task.restart(rng())
    after = task.module.quantize.embedding.weight.detach()
    assert moved == 4096 - len(used)
    changed = (after != before).any(dim=1)
    assert not changed[used].any()
    assert changed.sum() == moved
    assert task.restart(rng()) == 4096, "the count begins anew"
    # The first residual of scale 0 is the mean of the features, so with 155 · 8 residuals one of 4000 draws is such.
    features = task.module.encode(pixels.float() / 127.5 - 1).mean(dim=(2, 3))
    assert torch.cdist(features, after).min() < 1e-4


def test_labels_are_dropped_at_the_share_asked_for():
    labels = drop_labels(torch.zeros(20000, dtype=torch.int64), 0.1, 10, rng())
    share = (labels == 10).double().mean()
    assert abs(share - 0.1) < 4 * (0.09 / 20000) ** 0.5
    assert set(labels.tolist()) == {0, 10}


def test_shifts_move_whole_images():
    row = torch.arange(32.0)
    images = (row[:, None] * 100 + row[None, :]).expand(40, 3, 32, 32)
    moved = shifted(images, rng())
    inner = slice(MOST_SHIFT, 32 - MOST_SHIFT)
    offsets = (moved - images)[:, :, inner, inner]
    assert torch.equal(offsets.amax(dim=(1, 2, 3)), offsets.amin(dim=(1, 2, 3))), "one shift an image"
    assert len(offsets[:, 0, 0, 0].unique()) > 20


@torch.no_grad()
def test_perceptual_distance_is_zero_of_equals_and_grows():
    images = torch.rand(2, 3, 32, 32, generator=rng()) * 2 - 1
    net = load_featurenet()
    assert float(perceptual_distance(net, images, images)) == 0
    near, far = (float(perceptual_distance(net, images, (images + n).clamp(-1, 1))) for n in (0.05, 0.5))
    assert 0 < near < far


def test_judging_drops_no_label_and_repeats(jpegs):
    from qexport_models.train.data import read_images

    images, _ = read_images(jpegs)
    task = bundled("dit")
    task.module.train()
    first = judge(task, images, 7)
    assert first == judge(task, images, 7)
    assert task.module.training


@pytest.mark.parametrize("kind", KINDS)
def test_rate_falls_to_a_hundredth(kind):
    recipe = default_recipe(kind, 2)
    assert recipe.rate(recipe.warmup) == pytest.approx(1, rel=0.02)
    assert recipe.rate(recipe.steps) == pytest.approx(LAST_RATE)


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match=r"depth 99 is out of range"):
        default_recipe("var", 99)
    with pytest.raises(InputError, match=r"no kind of model"):
        default_recipe("gan", 2)


def test_scales_are_those_of_the_reference_models():
    task = make_task(default_recipe("var", 5))
    assert isinstance(task, VARTask)
    assert task.module.config.scales == SCALES_32
    assert sum(p.numel() for p in task.module.parameters()) == pytest.approx(10.8e6, rel=0.02), "as var-c10-d5"
