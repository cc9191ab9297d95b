"""Every family from quantiser through the same ladder to pictures, at 4 and at 8 bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support import CHECKPOINTS
from test_llamagen_family import build as tiny_llamagen

from qexport.bundle import Bundle
from qexport.errors import InputError
from qexport.family import Generator, find_model, load_random
from qexport.pipeline import export, load_generator
from qexport.recipe import recipe_for
from qexport.reference.backend import torch_player
from qexport.runtime import load
from qexport.scheme import preset
from qexport.verify import verify
from qexport.verify.quality import drawn_by

SAMPLES = 2


def bundled(name: str) -> Generator:
    family, entry = find_model(name)
    return family.load(entry, None, None)


@dataclass(frozen=True)
class Case:
    """A family: its smallest model, the figures it is judged by, and what they may be at 8 bits."""

    make: Callable[[], Generator]
    figures: tuple[str, ...]
    largest_at_8_bits: float
    schedule: str | None = None


CASES = {
    "var": Case(lambda: bundled("var-c10-d2"), ("kl", "top1_agreement"), 1e-3),
    "dit": Case(lambda: bundled("dit-c10-d2"), ("output_mse", "trajectory_error"), 1e-3, schedule="ddpm-10"),
    "llamagen": Case(tiny_llamagen, ("kl", "top1_agreement"), 1e-3),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[(family, bits) for family in CASES for bits in (8, 4)], ids=str)
def made(request, tmp_path_factory) -> tuple[Case, int, Generator, Bundle]:
    family, bits = request.param
    generator = CASES[family].make()
    recipe = recipe_for(preset(bits), generator.default_layers, f"w{bits}a16")
    folder = tmp_path_factory.mktemp("families") / f"{family}-{bits}"
    return CASES[family], bits, generator, export(generator, recipe, folder, progress=lambda *_: None)


@pytest.mark.slow
def test_the_ladder_passes_with_nothing_skipped(made):
    case, bits, generator, bundle = made
    report = verify(
        bundle.path, generator=generator, provider="cpu", samples=SAMPLES, schedule=case.schedule, speed=False
    )
    assert report.passed, report.failures
    assert report.skipped == []
    names = " ".join(check.name for check in report.checks)
    for rung in ("integrity", "layers not quantised", "sampling plan", "relative L2", "decode image", "free images"):
        assert rung in names
    assert set(case.figures) <= set(report.quality)
    assert report.quality["n"] == report.settings["samples"] == SAMPLES
    assert report.settings.get("schedule") == case.schedule
    error = report.quality[case.figures[0]]
    assert 0 < error < (case.largest_at_8_bits if bits == 8 else 1)
    assert len(report.pictures) == 4
    html = (bundle.reports / "verify.html").read_text(encoding="utf-8")
    assert "random weights" not in html
    assert ("trajectory error" in html) == (generator.denoise is not None)


@pytest.mark.slow
def test_the_bundle_draws(made):
    case, _, generator, bundle = made
    images = load(bundle.path, provider="cpu").generate([0, 1, 2], seed=1, schedule=case.schedule)
    side = generator.entry.image_size
    assert images.shape == (3, 3, side, side)
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.abs(images[0] - images[1]).max() > 0.01


@pytest.mark.slow
def test_a_limit_on_kl_is_for_models_that_draw_tokens(made):
    _, _, generator, bundle = made
    if generator.draw is None:
        with pytest.raises(InputError, match="draws no tokens"):
            verify(bundle.path, generator=generator, provider="cpu", max_kl=1.0)
    with pytest.raises(InputError, match="unknown schedule 'ddim-26'"):
        verify(bundle.path, generator=generator, provider="cpu", schedule="ddim-26")


@pytest.mark.parametrize("name", ["llamagen-b-256", "var-d16", "dit-s-8-256"])
def test_published_sizes_are_compared_on_few_samples(name):
    with torch.device("meta"):
        effort = _shape_of(name).effort
    assert effort.samples <= 2
    assert bundled("var-c10-d2").effort.samples > effort.samples
    assert (effort.schedule is None) == (not name.startswith("dit"))


def _shape_of(name: str) -> Generator:
    """The model without numbers."""
    from qexport_models.dit import family as dit
    from qexport_models.llamagen import family as llamagen
    from qexport_models.var import family as var

    entry = find_model(name)[1]
    config = entry.config
    if entry.family == "dit":
        return dit.assemble(entry, dit.DiT(config["dit"]), dit.AutoencoderKL(config["vae"]), {})
    if entry.family == "var":
        return var.assemble(entry, var.VAR(config["var"]), var.VQVAE(config["vae"]), {})
    return llamagen.assemble(entry, llamagen.GPT(config["gpt"]), llamagen.VQ(config["vq"]), {})


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".safetensors", ""])
@pytest.mark.parametrize("name", ["var-c10-d2", "dit-c10-d2"])
def test_a_file_of_any_name_is_recognised(tmp_path, name, suffix):
    copy = Path(shutil.copy(CHECKPOINTS / f"{name}.safetensors", tmp_path / f"mine{suffix}"))
    generator = load_generator(None, str(copy))
    assert generator.entry.name == name
    assert generator.checkpoint_sha256 == bundled(name).checkpoint_sha256


def test_without_a_name_or_a_file():
    with pytest.raises(InputError, match="say which model"):
        load_generator(None)
    with pytest.raises(InputError, match="it stands for the file"):
        load_generator(None, random_weights=0)


def test_random_llamagen_is_finite_spread_and_marked(monkeypatch):
    """A shallow one: depth changes the stream's size by its square root only."""
    from dataclasses import replace

    from qexport_models.llamagen import family

    entry = find_model("llamagen-b-256")[1]
    config = replace(entry.config["gpt"], depth=3, length=16, vocab_size=512)
    vq = replace(entry.config["vq"], codes=512, ch=32)
    small = replace(entry, config={**entry.config, "gpt": config, "vq": vq})
    monkeypatch.setattr(family, "FAMILY", replace(family.FAMILY, entries=(small,)))
    generator = load_random("llamagen-b-256", 5)
    assert generator.entry.source == "random weights, seed 5: not a model"
    assert generator.checkpoint_sha256 == {}
    assert generator.quality is not None
    spreads: list[float] = []
    model: family.GPT = generator.quality.gpt
    for layer in model.layers:
        layer.register_forward_hook(lambda module, given, out: spreads.append(float(out[0].std())))
    images = torch_player(generator).play({"label": [0, 1]}, seed=0)
    assert np.isfinite(images).all()
    assert 0.02 < images.std() < 0.6
    assert min(spreads) > 0.3
    assert max(spreads) < 10
    labels, tokens = next(drawn_by(generator, 2, 0, 2))
    assert len(np.unique(tokens)) > 8
    logits = generator.quality.teacher_forced_logits(torch.from_numpy(labels), torch.from_numpy(tokens))
    assert 1 < float(logits.std()) < 6
