import pytest
import torch
import torch.nn.functional as F
from dit_support import BROKEN, RELATIVE_L2, checkpoint, on_meta, published_lists, relative_l2, spec, state_of, tensors
from qexport_models.autoencoder_kl.config import KLVAE_C10, SD_VAE, AutoencoderKLConfig
from qexport_models.autoencoder_kl.decode import Decode
from qexport_models.autoencoder_kl.load import build_autoencoder_kl, current_names
from qexport_models.autoencoder_kl.model import AutoencoderKL
from qexport_models.conv_blocks import Downsample
from qexport_models.strict_load import check_layout

from qexport.errors import CheckpointError

TINY = AutoencoderKLConfig(block_out_channels=(32, 64), layers_per_block=1)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def fixture():
    return tensors("sdvae-tiny-shared")


@pytest.fixture(scope="module")
def vae(fixture):
    return build_autoencoder_kl(TINY, state_of(fixture))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("config", "recorded"),
    [(TINY, spec("sdvae-tiny-shared")["config"]), (SD_VAE, published_lists()["sdvae_ft_diffusers"]["config"])],
)
def test_config_is_the_recorded_one(config, recorded):
    assert list(config.block_out_channels) == recorded["block_out_channels"]
    for name in (
        "layers_per_block",
        "in_channels",
        "out_channels",
        "latent_channels",
        "norm_num_groups",
        "scaling_factor",
    ):
        assert getattr(config, name) == recorded[name]


def test_encode(vae, fixture):
    moments = vae.encode_moments(fixture["in.img"])
    assert relative_l2(moments, fixture["out.moments"]) <= RELATIVE_L2
    assert relative_l2(vae.encode_mean(fixture["in.img"]), fixture["out.mode"]) <= RELATIVE_L2
    assert relative_l2(moments[:, TINY.latent_channels :].clamp(-30, 20), fixture["out.logvar"]) <= RELATIVE_L2


def test_decode(vae, fixture):
    assert relative_l2(vae.decode(fixture["in.latent"]), fixture["out.decode"]) <= RELATIVE_L2


def test_reconstruction_is_decode_of_the_mean(vae, fixture):
    assert torch.equal(vae(fixture["in.img"]), vae.decode(vae.encode_mean(fixture["in.img"])))


def test_mutation_padding_on_both_sides_shows(vae, fixture, monkeypatch):
    monkeypatch.setattr(Downsample, "forward", lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, 2, 1))
    assert relative_l2(vae.encode_moments(fixture["in.img"]), fixture["out.moments"]) > BROKEN


def test_mutation_swapped_query_and_value_shows(fixture):
    prefix = "decoder.mid_block.attentions.0."
    state = state_of(fixture)
    state[prefix + "to_q.weight"], state[prefix + "to_v.weight"] = (
        state[prefix + "to_v.weight"],
        state[prefix + "to_q.weight"],
    )
    got = build_autoencoder_kl(TINY, state).decode(fixture["in.latent"])
    assert relative_l2(got, fixture["out.decode"]) > BROKEN


def test_old_attention_names_are_understood(vae, fixture):
    old = {}
    for key, value in state_of(fixture).items():
        for new_name, old_name in OLD_NAMES.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        old[key] = value
    assert sum("proj_attn" in key for key in old) == 4
    loaded = build_autoencoder_kl(TINY, old)
    assert relative_l2(loaded.decode(fixture["in.latent"]), fixture["out.decode"]) <= RELATIVE_L2


def test_published_layout_loads_strictly():
    published = published_lists()["sdvae_ft_diffusers"]
    with torch.device("meta"):
        module = AutoencoderKL(SD_VAE)
    check_layout(module, current_names(on_meta(published["shapes"])), "an AutoencoderKL")
    assert sum(p.numel() for p in module.parameters()) == published["parameters"]
    assert (SD_VAE.downsampling, KLVAE_C10.downsampling) == (8, 2)


def test_another_architecture_is_refused(fixture):
    with pytest.raises(CheckpointError, match=r"not an AutoencoderKL with channels \(64, 128\)"):
        build_autoencoder_kl(KLVAE_C10, state_of(fixture))


def test_bundled_checkpoint():
    expected = tensors("zoo-expected-dit")
    model = build_autoencoder_kl(KLVAE_C10, checkpoint("klvae-c10"))
    moments = model.encode_moments(expected["images_u8"].float() / 127.5 - 1)
    assert relative_l2(moments, expected["klvae.moments"]) <= RELATIVE_L2
    mean = expected["klvae.moments"][:, : KLVAE_C10.latent_channels]
    assert relative_l2(model.decode(mean), expected["klvae.decode_of_mean"]) <= RELATIVE_L2


def test_decode_graph_undoes_the_scaling_and_ends_in_the_unit_interval():
    expected = tensors("zoo-expected-dit")
    graph = Decode(build_autoencoder_kl(KLVAE_C10, checkpoint("klvae-c10")))
    want = expected["klvae.decode_of_mean"].double().mul(0.5).add(0.5).clamp(0, 1)
    latents = 0.8385 * expected["klvae.moments"][:, :4]
    (image,) = graph(latents)
    assert image.dtype == torch.float32
    assert relative_l2(image, want) <= RELATIVE_L2
    assert relative_l2(graph(latents / 0.8385)[0], want) > BROKEN  # forgotten
    (extreme,) = graph(100 * latents)
    assert (extreme.min(), extreme.max()) == (0, 1)


def test_decode_graph_holds_no_encoder(vae):
    names = {name for name, _ in Decode(vae).named_parameters()}
    assert names == {name for name in vae.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}


def test_one_program_serves_every_batch(vae, fixture):
    graph = Decode(vae)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(graph, (fixture["in.latent"],), dynamic_shapes=(batch,)).module()
    for count in (1, 3):
        latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(count))
        assert relative_l2(program(latents)[0], graph(latents)[0]) <= RELATIVE_L2
