"""Which model a state dict is: against the recorded keys and shapes of every published file."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from qexport_models.dit.config import CONFIGS as DIT_CONFIGS
from qexport_models.recognise import describe, looks_like, recognise_dit, recognise_llamagen, recognise_var
from qexport_models.var.family import ENTRIES, FAMILY

from qexport.errors import InputError
from qexport.family import Family, recognise

KEYS = Path(__file__).parents[1] / "fixtures" / "keys"


def recorded() -> dict[str, dict[str, tuple[int, ...]]]:
    found = {}
    for file in ("var", "dit", "llamagen", "others"):
        for name, record in json.loads(gzip.decompress((KEYS / f"{file}.json.gz").read_bytes())).items():
            prefix = "llamagen_" if file == "llamagen" else ""
            found[prefix + name] = {key: tuple(shape) for key, shape in record["shapes"].items()}
    return found


RECORDED = recorded()

MODELS = {
    **{f"var_d{depth}": (f"var-d{depth}",) for depth in (16, 20, 24, 30)},
    "var_d36": ("var-d36-512",),
    **{
        f"dit_{size}_{patch}_{pixels}": (f"dit-{size.lower()}-{patch}-{pixels}",)
        for size in ("S", "B", "L", "XL")
        for patch in (2, 4, 8)
        for pixels in (256, 512)
        if pixels == 256 or (size, patch) == ("XL", 2)
    },
    "dit_XL_2_256_diffusers": ("dit-xl-2-256", "dit-xl-2-512"),
    "dit_XL_2_512_diffusers": ("dit-xl-2-256", "dit-xl-2-512"),
    "llamagen_c2i_GPT-B": ("llamagen-b-256", "llamagen-b-384"),
    "llamagen_c2i_GPT-L": ("llamagen-l-256", "llamagen-l-384"),
    "llamagen_c2i_GPT-XL": ("llamagen-xl-384",),
    "llamagen_c2i_GPT-XXL": ("llamagen-xxl-384",),
    "llamagen_c2i_GPT-3B": ("llamagen-3b-384",),
    "llamagen_c2i_GPT-1B": ("llamagen-1b-384",),
    "llamagen_c2i_GPT-XXXL": ("llamagen-xxxl-384",),
}
WORDS = {
    "var_vae_ch160v4096z32": "VAR's VQVAE",
    "llamagen_VQ-16": "LlamaGen's VQ tokeniser",
    "llamagen_VQ-8": "LlamaGen's VQ tokeniser",
    "sdvae_ft_diffusers": "a KL autoencoder (diffusers)",
    "llamagen_t2i_GPT-XL": "a text-to-image LlamaGen with 36 layers of width 1280",
    "mar_kl16": "a KL autoencoder (CompVis) of 16 latent channels",
    "mar_base": "MAR-B (masked autoregressive model)",
    "mar_large": "MAR-L (masked autoregressive model)",
    "mar_huge": "MAR-H (masked autoregressive model)",
}
REASONS = {
    "llamagen_t2i_GPT-XL": r"which cannot be played yet: .* features that a T5 encoder makes",
    "mar_kl16": r"MAR's decoder, which no generator here uses$",
    **{
        f"mar_{size}": r"which is not supported: it draws every token by a diffusion"
        for size in ("base", "large", "huge")
    },
}
"""Of what no model here can use; the other ones in `WORDS` are decoders of models that there are."""


def test_every_recorded_list_is_expected_to_be_something():
    assert set(RECORDED) == set(MODELS) | set(WORDS)


@pytest.mark.parametrize("name", RECORDED)
def test_published_shapes(name):
    shapes = RECORDED[name]
    found = [hit for hook in (recognise_var, recognise_dit, recognise_llamagen) for hit in hook(shapes, {})]
    assert tuple(found) == MODELS.get(name, ())
    assert looks_like(shapes) == (WORDS[name] if name in WORDS else " or ".join(MODELS[name]))


@pytest.mark.parametrize("name", WORDS)
def test_what_is_no_model_is_refused_by_name(name):
    """By the toolchain with all families installed, as for a file that is given without --model."""
    reason = REASONS.get(name, "a decoder and no generator: pass it as --vae-checkpoint$")
    with pytest.raises(InputError, match=f"^these weights are {re.escape(WORDS[name])}, {reason}") as caught:
        recognise(RECORDED[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_a_model_is_recognised(name):
    names = MODELS[name]
    if len(names) == 1:
        assert recognise(RECORDED[name]).name == names[0]
    else:
        with pytest.raises(InputError, match=f"^these weights may be {' or '.join(names)}, which"):
            recognise(RECORDED[name])


def test_every_list_in_the_shared_folder_is_recorded_here():
    """Where the originals' lists are at hand: all of them, and the shapes are the same."""
    folder = Path(__file__).parents[3] / "shared" / "keys"
    if not folder.is_dir():
        pytest.skip("the originals' lists are not here")
    lists = {file.stem: json.loads(file.read_text())["keys"] for file in folder.glob("*.json")}
    assert lists.keys() == RECORDED.keys()
    for name, keys in lists.items():
        assert {key: tuple(entry["shape"]) for key, entry in keys.items()} == RECORDED[name], name


@pytest.mark.parametrize(("side", "pixels"), [(32, 256), (64, 512)])
def test_diffusers_config_tells_the_size(side, pixels):
    assert recognise_dit(RECORDED[f"dit_XL_2_{pixels}_diffusers"], {"sample_size": side}) == (f"dit-xl-2-{pixels}",)


def test_a_model_of_another_size_is_not_taken_for_a_known_one():
    shapes = dict(RECORDED["var_d16"])
    shapes["class_emb.weight"] = (101, 1024)
    assert recognise_var(shapes) == ()
    assert looks_like(shapes) == "a VAR with 16 blocks of width 1024, 680 tokens and 100 classes"
    deeper = RECORDED["dit_S_2_256"] | {"blocks.12.attn.qkv.weight": (1152, 384)}
    assert recognise_dit(deeper) == ()
    assert looks_like(deeper) == "a DiT with 13 blocks of width 384 and patch 2, for 1000 classes"
    assert looks_like({"x": (1,)}) is None
    assert describe({"x": (1,)}) is None
    assert (
        describe(deeper)
        == f"{looks_like(deeper)}, a size that no model here has; `qexport models` lists those that there are"
    )
    assert looks_like({"mask_token": (), "encoder_pos_embed_learned": (), "diffloss.net.input_proj.weight": ()}) is None
    assert looks_like({"pos_1LC": (1,), "class_emb.weight": (), "blocks.0.attn.mat_qkv.weight": ()}) is None


def test_names_are_those_of_the_entries():
    names = {entry.name for entry in ENTRIES}
    depths = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36")
    assert {hit for name in depths for hit in recognise_var(RECORDED[name])} <= names
    assert set(MODELS["dit_XL_2_256_diffusers"]) <= set(DIT_CONFIGS)


def test_toolchain_asks_the_families(monkeypatch):
    entry = next(entry for entry in ENTRIES if entry.name == "var-d36-512")
    monkeypatch.setattr("qexport.family.registry.families", lambda: (FAMILY, Family("without", (), FAMILY.load)))
    assert recognise(RECORDED["var_d36"]) is entry
    with pytest.raises(InputError, match=r"begin a, b.*--model"):
        recognise({"a": (1,), "b": (2,)})

    both = Family("both", ENTRIES[3:5], FAMILY.load, recognise=lambda shapes, config: ("var-d16", "var-d20"))
    monkeypatch.setattr("qexport.family.registry.families", lambda: (both,))
    with pytest.raises(InputError, match=r"var-d16 or var-d20.*--model"):
        recognise({})
    assert recognise({}, file="var_d20.pth").name == "var-d20"
