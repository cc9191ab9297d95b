"""DiT as a family: entries, the exported bundle against the torch modules, schedules, quality of the denoiser."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from dit_support import BROKEN, RELATIVE_L2, published_lists, relative_l2, state_of, tensors
from qexport_models.autoencoder_kl.config import AutoencoderKLConfig
from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.dit.config import DiTConfig
from qexport_models.dit.embed import position_table
from qexport_models.dit.family import ENTRIES, FAMILY, assemble, load
from qexport_models.dit.load import build_dit
from qexport_models.dit.sampling_plan import SCHEDULE_STEPS, tables
from qexport_models.dit.schedule import ddim_rows, ddpm_rows, make_schedule

from qexport import runtime
from qexport.errors import CheckpointError, InputError
from qexport.family import find_model, load_random, random_seed
from qexport.pipeline import export, quantize
from qexport.quantize import apply_stored, stored_weights
from qexport.recipe import recipe_for
from qexport.reference.backend import torch_player
from qexport.runtime import Player
from qexport.scheme import preset
from qexport.verify.denoise_quality import make_probe, output_quality, runtime_student, torch_student

TINY = DiTConfig(input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10)
TINY_VAE = AutoencoderKLConfig(block_out_channels=(32, 32), layers_per_block=1)
ENTRY = replace(find_model("dit-c10-d2")[1], name="dit-tiny", image_size=16, parameters=TINY.parameters)
BLOCK_MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
LABELS = np.array([3, 8])


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(TINY_VAE).eval().requires_grad_(False)


def generator(vae):
    return assemble(ENTRY, build_dit(TINY, state_of(tensors("dit-tiny-shared"))), vae, {"model": "0" * 64})


class Exported:
    """The tiny model as a bundle of `bits`, and its quantised torch reference."""

    def __init__(self, vae, folder: Path, bits: int) -> None:
        scheme = preset(bits)
        self.reference = generator(vae)
        self.recipe = recipe_for(scheme, self.reference.default_layers, scheme.name)
        self.bundle = export(self.reference, self.recipe, folder, progress=lambda *_: None)
        apply_stored(self.reference, stored_weights(self.reference, self.recipe))
        self.runtime = runtime.load(folder, "cpu", "exact", threads=1)


@pytest.fixture(scope="module", params=[4, 8])
def exported(request, vae, tmp_path_factory):
    return Exported(vae, tmp_path_factory.mktemp("dit") / "bundle", request.param)


# --- what can be loaded ---------------------------------------------------------------------------------------------


def test_entries():
    names = [entry.name for entry in ENTRIES]
    sizes = [f"dit-{s}-{p}-{r}" for s in ("s", "b", "l", "xl") for p in (2, 4, 8) for r in (256, 512)]
    assert sorted(names) == sorted([*sizes, "dit-c10-d2", "dit-c10-d3", "dit-c10-d4", "dit-c10-d5"])
    for name in names:
        family, entry = find_model(name)
        assert family is FAMILY
        reference = name.startswith("dit-c10-")
        assert entry.image_size == (32 if reference else int(name.rpartition("-")[2]))
        assert ("non-commercial" in entry.licence) is (name in ("dit-xl-2-256", "dit-xl-2-512"))
        assert entry.bundled is (reference and name != "dit-c10-d5")
    xl = find_model("dit-xl-2-512")[1]
    assert xl.files == ("DiT-XL-2-512x512.pt", "sd-vae-ft-ema/diffusion_pytorch_model.safetensors")
    assert xl.parameters == find_model("dit-xl-2-256")[1].parameters + 768 * 1152  # more positions


def test_parameters_are_those_of_the_published_lists():
    lists = {name: x for name, x in published_lists().items() if not name.endswith("_diffusers")}
    for name, published in lists.items():
        assert find_model(name.replace("_", "-").lower())[1].parameters == published["parameters"]
    assert find_model("dit-xl-2-256")[1].parameters == 675_129_632


def test_published_ones_say_what_they_need(monkeypatch, tmp_path):
    monkeypatch.setenv("QEXPORT_CHECKPOINTS", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"DiT-XL-2-256x256\.pt .*dl\.fbaipublicfiles\.com.*non-commercial"):
        load(find_model("dit-xl-2-256")[1], None, None)


@pytest.mark.parametrize(("name", "default"), [("dit-c10-d2", "ddpm-50"), ("dit-xl-2-256", "ddpm-250")])
def test_plan_of(name, default):
    """Of the published one on torch's meta device: nothing is computed."""
    entry = find_model(name)[1]
    with torch.device("meta"):
        model = assemble(entry, _shell(entry), AutoencoderKL(entry.config["vae"]), {})
    plan = model.plan
    assert (plan.schedule, plan.calls[0].repeat) == (default, int(default.partition("-")[2]))
    assert set(plan.schedules) == {f"{s}-{n}" for s in ("ddpm", "ddim") for n in SCHEDULE_STEPS}
    assert {i.name: i.default for i in plan.inputs} == {"label": None, "cfg": 1.5, "eta": 0.0}
    assert plan.calls[1].graph == "decode"
    blocks = [f"blocks.{i}.{matrix}" for i in range(entry.config["dit"].depth) for matrix in BLOCK_MATRICES]
    parameters = model.graph("denoise").parameters()
    assert set(blocks) < set(model.layers)
    for graph, weight in model.layers.values():
        assert graph == "denoise"
        assert parameters[weight].ndim == 2
    assert sum(p.numel() for p in parameters.values()) == entry.parameters
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in model.graph("decode").parameters())
    assert model.graph("decode").outputs[0].shape == ("batch", 3, entry.image_size, entry.image_size)
    assert (model.features is not None) is entry.name.startswith("dit-c10-")


def _shell(entry):
    from qexport_models.dit.model import DiT

    return DiT(entry.config["dit"])


def test_random_weights_are_marked_and_reproducible():
    model, again = load_random("dit-c10-d2", 3), load_random("dit-c10-d2-random", 3)
    assert (model.entry.name, random_seed(model.entry.source)) == ("dit-c10-d2-random", 3)
    assert (model.features, dict(model.checkpoint_sha256)) == (None, {})
    assert model.plan.schedule == "ddpm-50"
    first, second = model.graph("denoise").parameters(), again.graph("denoise").parameters()
    assert all(torch.equal(first[name], second[name]) for name in first)
    np.testing.assert_array_equal(first["pos_embed"][0], position_table(128, 8))
    found = [float(s["output"].std()) for s in steps(torch_player(model).with_schedule("ddim-10"))[:-1]]
    assert all(0.3 < spread < 3 for spread in found)


def test_schedule_tables_hold_the_rows():
    found = tables()
    assert sum(rows.nbytes for rows in found.values()) < 40_000
    np.testing.assert_array_equal(found["schedule.ddpm-50"], ddpm_rows(make_schedule("50")))
    np.testing.assert_array_equal(found["schedule.ddim-25"], ddim_rows(make_schedule("ddim25")))


# --- the bundle against the torch modules ---------------------------------------------------------------------------


def steps(player, seed=1, **inputs):
    """Every value that the calls of one play return, by port, in order."""
    found = []
    player.play(
        {"label": LABELS, **inputs},
        seed=seed,
        observer=lambda record: found.append(
            {port: torch.from_numpy(np.array(player.backend.get(value))) for port, value in record.results.items()}
        ),
        extra_outputs={"denoise": ["output"]},
    )
    return found


def worst(wanted, found) -> float:
    assert len(wanted) == len(found)
    return max(relative_l2(f[port], w[port]) for w, f in zip(wanted, found, strict=True) for port in w)


@pytest.mark.parametrize(
    ("schedule", "inputs"),
    [("ddpm-50", {}), ("ddpm-10", {"cfg": 4.0}), ("ddim-10", {"eta": 0.0}), ("ddim-20", {"eta": 0.7, "cfg": 1.0})],
)
def test_every_step_is_that_of_the_quantised_torch_model(exported, schedule, inputs):
    wanted = steps(torch_player(exported.reference).with_schedule(schedule), **inputs)
    found = steps(exported.runtime.player.with_schedule(schedule), **inputs)
    assert len(found) == int(schedule.partition("-")[2]) + 1
    assert worst(wanted, found) <= RELATIVE_L2


def test_schedules_and_inputs_matter(exported):
    player = exported.runtime.player.with_schedule("ddim-10")
    base = steps(player)[-1]["image"]
    for other in (
        steps(player, cfg=3.0),
        steps(player, eta=1.0),
        steps(player, seed=2),
        steps(player.with_schedule("ddpm-10")),
        steps(player.with_schedule("ddim-20")),
    ):
        assert relative_l2(other[-1]["image"], base) > BROKEN


def test_generate_by_schedule_without_a_new_export(exported):
    images = exported.runtime.generate(LABELS, seed=1, schedule="ddim-10", batch=1)
    assert images.shape == (2, 3, 16, 16)
    want = steps(torch_player(exported.reference).with_schedule("ddim-10"))[-1]["image"]
    assert np.abs(images - want.numpy()).max() <= 1e-4
    with pytest.raises(InputError, match="unknown schedule 'ddim-11'; did you mean 'ddim-10'"):
        exported.runtime.generate(LABELS, schedule="ddim-11")


@pytest.mark.parametrize("layer", ["blocks.1.adaLN_modulation.1", "blocks.0.mlp.fc2"])
def test_mutation_one_doubled_scale_shows(exported, vae, layer):
    broken = generator(vae)
    apply_stored(broken, stored_weights(broken, exported.recipe))
    weight = broken.graph("denoise").parameters()[f"{layer}.weight"]
    weight[:, :32] *= 2
    found = steps(exported.runtime.player.with_schedule("ddim-10"))
    assert worst(steps(torch_player(broken).with_schedule("ddim-10")), found) > BROKEN


def test_mutation_another_noise_shows(exported):
    wanted = steps(torch_player(exported.reference).with_schedule("ddpm-10"))
    found = steps(exported.runtime.player.with_schedule("ddpm-10"), seed=2)
    assert worst(wanted[:1], found[:1]) > BROKEN


def test_every_block_matrix_is_quantised_and_named_as_in_the_checkpoint(exported):
    model = onnx.load(exported.bundle.path / "denoise.onnx", load_external_data=False)
    dequantised = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert dequantised == {f"blocks.{i}.{matrix}.weight" for i in range(TINY.depth) for matrix in BLOCK_MATRICES}
    names = {init.name for init in model.graph.initializer}
    assert set(state_of(tensors("dit-tiny-shared"))) <= names
    silu = [node for node in model.graph.node if node.op_type in ("Sigmoid", "Swish")]
    assert len(silu) == 2  # of the timestep's MLP, and one of the condition for all blocks
    assert exported.bundle.manifest.totals["layers_quantized"] == len(dequantised)
    assert exported.bundle.plan.schedule == "ddpm-50"


def test_a_bundle_plays_by_its_own_plan_and_tables(exported):
    """What is on disk, not what the family would say today."""
    bundle = exported.bundle
    player = Player(bundle.plan, exported.runtime.player.backend, bundle.tables()).with_schedule("ddim-10")
    assert worst(steps(exported.runtime.player.with_schedule("ddim-10")), steps(player)) == 0


@pytest.mark.slow
def test_a_bundled_model_by_name(tmp_path):
    bundle = quantize("dit-c10-d2", out=tmp_path / "bundle")
    reference = load(find_model("dit-c10-d2")[1], None, None)
    apply_stored(reference, stored_weights(reference, recipe_for(preset(4), reference.default_layers, "w4a16")))
    player = runtime.load(bundle.path, "cpu", "exact", threads=1).player.with_schedule("ddim-20")
    wanted = steps(torch_player(reference).with_schedule("ddim-20"))
    assert worst(wanted, steps(player)) <= RELATIVE_L2
    assert float(wanted[-1]["image"].std()) > 0.1


# --- quality --------------------------------------------------------------------------------------------------------


def test_adding_noise(vae):
    """arXiv:2006.11239, equation 4, ᾱ in float64 by hand."""
    model = generator(vae).denoise.model
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    t = torch.tensor([0, 500, 999])
    got = model.add_noise(latents, noise, t)
    for i, a in enumerate(alpha[t.numpy()]):
        assert relative_l2(got[i], np.sqrt(a) * latents[i].double() + np.sqrt(1 - a) * noise[i].double()) <= 1e-6


def test_latents_are_scaled_means(vae):
    model = generator(vae).denoise.model
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.encode(images), vae.encode_mean(images * 2 - 1) * TINY_VAE.scaling_factor)


def test_quality_of_the_bundle_is_that_of_the_quantised_reference(exported, vae):
    full = generator(vae).denoise
    images = np.random.default_rng(0).random((6, 3, 16, 16), np.float32)
    probe = make_probe(full.model, images, np.arange(6))
    fp = torch_student(full.model)(probe)
    by_torch = torch_student(exported.reference.denoise.model)(probe)
    by_bundle = runtime_student(exported.runtime.player, full)(probe)
    assert relative_l2(torch.from_numpy(by_bundle), torch.from_numpy(by_torch)) <= RELATIVE_L2
    bits = exported.recipe.name
    low, high = {"w4a16": (1e-4, 1e-1), "w8a16": (1e-7, 1e-3)}[bits]
    assert low < output_quality(probe, fp, by_bundle).output_mse < high
