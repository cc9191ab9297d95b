import dataclasses

import numpy as np
import pytest
import torch
from dit_support import BROKEN, RELATIVE_L2, checkpoint, on_meta, published_lists, relative_l2, spec, state_of, tensors
from qexport_models.dit.config import CONFIGS, DiTConfig, config
from qexport_models.dit.denoise import DenoiseStep
from qexport_models.dit.embed import position_table
from qexport_models.dit.load import build_dit, published_state
from qexport_models.dit.model import DiT
from qexport_models.dit.schedule import ROW_COLUMNS, ddim_rows, ddpm_rows, make_schedule
from qexport_models.strict_load import check_layout
from recipe_weights import fill, unit

from qexport.errors import CheckpointError, InputError

TINY = DiTConfig(input_size=8, patch_size=2, hidden_size=64, depth=2, num_heads=4, num_classes=10)
LOOPS = {"ddpm": ("8", 4.0), "ddim": ("ddim10", 1.5)}


@pytest.fixture(scope="module")
def fixture():
    return tensors("dit-tiny-shared")


@pytest.fixture(scope="module")
def dit(fixture):
    return build_dit(TINY, state_of(fixture))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def rows_of(tag: str) -> torch.Tensor:
    schedule = make_schedule(LOOPS[tag][0])
    return torch.from_numpy(ddpm_rows(schedule) if tag == "ddpm" else ddim_rows(schedule))


def play(step: DenoiseStep, fixture, tag: str, rows=None, half: int = 0) -> list[float]:
    """Relative L2 of the first half's state after every step of the fixture's loop, carrying that half alone."""
    rows = rows_of(tag) if rows is None else rows
    x = fixture["in.z"]
    noise = fixture["ddpm.noise"] if tag == "ddpm" else torch.zeros_like(fixture["ddim.sample"])
    errors = []
    for i, row in enumerate(rows):
        x, _ = step(fixture["in.y"], x, noise[i].chunk(2)[half], row, scalar(LOOPS[tag][1]), scalar(0.0))
        errors.append(relative_l2(x, fixture[f"{tag}.sample"][i, : len(x)]))
    assert relative_l2(x, fixture[f"{tag}.final"]) == errors[-1]
    return errors


# --- the model ------------------------------------------------------------------------------------------------------


def test_config_is_that_of_the_fixture():
    recorded = spec("dit-tiny-shared")["config"]
    assert {k: v for k, v in recorded.items() if k != "class_dropout_prob"} == {
        k: v for k, v in dataclasses.asdict(TINY).items() if k != "frequency_denominator"
    }


def test_position_table(fixture):
    want = fixture["sd.pos_embed"][0].numpy()
    table = position_table(TINY.hidden_size, TINY.grid_size)
    assert np.array_equal(table, want)
    rows_first = np.concatenate([table[:, 32:], table[:, :32]], axis=1)
    assert not np.allclose(rows_first, want)


def test_embedders(dit, fixture):
    assert relative_l2(dit.x_embedder(fixture["in.x"]), fixture["out.x_embedder"]) <= RELATIVE_L2
    assert relative_l2(dit.t_embedder(fixture["in.t"]), fixture["out.t_embedder"]) <= RELATIVE_L2
    assert torch.equal(dit.y_embedder(fixture["in.y"]), fixture["out.y_embedder"])


def test_every_block(dit, fixture):
    outputs = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: outputs.append(out)) for block in dit.blocks]
    dit(fixture["in.x"], fixture["in.t"], fixture["in.y"])
    for hook in hooks:
        hook.remove()
    assert len(outputs) == TINY.depth
    for i, out in enumerate(outputs):
        assert relative_l2(out, fixture[f"out.block.{i}"]) <= RELATIVE_L2


def test_forward(dit, fixture):
    got = dit(fixture["in.x"], fixture["in.t"], fixture["in.y"])
    assert relative_l2(got, fixture["out.forward"]) <= RELATIVE_L2
    null = torch.full_like(fixture["in.y"], TINY.null_class)
    assert relative_l2(dit(fixture["in.x"], fixture["in.t"], null), fixture["out.null_forward"]) <= RELATIVE_L2


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_forward_with_cfg(dit, fixture, scale):
    # Whatever the second half holds is not read.
    x = torch.cat([fixture["in.x"], torch.full_like(fixture["in.x"], torch.nan)])
    got = dit.forward_with_cfg(x, fixture["in.cfg_t"], fixture["in.cfg_y"], scale)
    assert relative_l2(got, fixture[f"out.forward_with_cfg.{scale}"]) <= RELATIVE_L2


def test_one_timestep_serves_the_batch(dit, fixture):
    many = dit(fixture["in.x"], torch.tensor([37, 37]), fixture["in.y"])
    assert relative_l2(dit(fixture["in.x"], torch.tensor([37.0]), fixture["in.y"]), many) <= 1e-6


def test_half_precision_keeps_the_timesteps_exact(dit, fixture):
    """Were the frequencies rounded to float16 as well, t = 999 would be another timestep."""
    half = build_dit(TINY, state_of(fixture)).half()
    got = half(fixture["in.x"].half(), fixture["in.t"], fixture["in.y"])
    assert got.dtype == torch.float16
    assert relative_l2(got, fixture["out.forward"]) <= 4 * 2.0**-10  # a few roundings of float16
    step = DenoiseStep(half)
    x, guided = step(fixture["in.y"], fixture["in.z"], fixture["in.x"], rows_of("ddpm")[0], scalar(4), scalar(0))
    assert x.dtype == guided.dtype == torch.float32


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda state, k: (state, dataclasses.replace(k, frequency_denominator=127)), id="127 frequencies"),
        pytest.param(lambda state, k: (swap_modulation(state), k), id="scale before shift"),
        pytest.param(lambda state, k: (state | {"pos_embed": state["pos_embed"].roll(32, 2)}, k), id="row first"),
        pytest.param(lambda state, k: (state, dataclasses.replace(k, num_heads=2)), id="half the heads"),
    ],
)
def test_mutations_of_the_model_show(fixture, mutate):
    state, changed = mutate(state_of(fixture), TINY)
    got = build_dit(changed, state)(fixture["in.x"], fixture["in.t"], fixture["in.y"])
    assert relative_l2(got, fixture["out.forward"]) > BROKEN


def swap_modulation(state):
    key = "blocks.1.adaLN_modulation.1.bias"
    shift, scale, *rest = state[key].chunk(6)
    return state | {key: torch.cat([scale, shift, *rest])}


# --- the step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", LOOPS)
def test_whole_loops_step_by_step(dit, fixture, tag):
    errors = play(DenoiseStep(dit), fixture, tag)
    assert len(errors) == spec("dit-tiny-shared")["loops"][tag]["steps"]
    assert max(errors) <= RELATIVE_L2


def test_the_second_half_of_the_published_loop_is_noise_of_its_own(dit, fixture):
    """So carrying the first half alone is exact because that half is all the model reads, not because both agree."""
    assert not torch.equal(*fixture["ddpm.noise"][0].chunk(2))
    assert not torch.equal(*fixture["ddpm.sample"][0].chunk(2))
    assert max(play(DenoiseStep(dit), fixture, "ddpm", half=1)) > BROKEN


@pytest.mark.parametrize("tag", LOOPS)
def test_guided_output_gives_the_recorded_prediction(dit, fixture, tag):
    step, rows = DenoiseStep(dit), rows_of(tag)
    x, noise = fixture["in.z"], torch.zeros_like(fixture["in.z"])
    for i, row in enumerate(rows):
        _, guided = step(fixture["in.y"], x, noise, row, scalar(LOOPS[tag][1]), scalar(0.0))
        assert guided.shape == (2, 8, 8, 8)
        x0 = row[1] * x - row[2] * guided[:, :4]
        assert relative_l2(x0, fixture[f"{tag}.pred_xstart"][i, :2]) <= RELATIVE_L2
        x = fixture[f"{tag}.sample"][i, :2]  # teacher forcing


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_with_eta(dit, fixture, eta):
    """arXiv:2010.02502, equations 12 and 16, in float64 from the recorded ᾱ."""
    alphas = np.cumprod(1 - fixture["ddim.betas"].numpy())
    rows, noise, x = rows_of("ddim"), fixture["ddpm.noise"][0, :2], fixture["in.z"]
    for index in (9, 4, 0):
        now, before = alphas[index], alphas[index - 1] if index else 1.0
        got, guided = DenoiseStep(dit)(fixture["in.y"], x, noise, rows[9 - index], scalar(1.5), scalar(eta))
        eps = guided[:, :4].double()
        x0 = (x.double() - np.sqrt(1 - now) * eps) / np.sqrt(now)
        sigma = eta * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
        want = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps + sigma * noise.double()
        assert relative_l2(got, want) <= RELATIVE_L2


def test_ddpm_ignores_eta_and_its_last_step_ignores_noise(dit, fixture):
    step, rows, y = DenoiseStep(dit), rows_of("ddpm"), fixture["in.y"]
    x, noise = fixture["in.z"], fixture["ddpm.noise"][0, :2]
    first = step(y, x, noise, rows[0], scalar(4), scalar(0))[0]
    assert torch.equal(first, step(y, x, noise, rows[0], scalar(4), scalar(1))[0])
    assert not torch.equal(first, step(y, x, 2 * noise, rows[0], scalar(4), scalar(0))[0])
    last = step(y, x, noise, rows[-1], scalar(4), scalar(0))[0]
    assert torch.equal(last, step(y, x, 2 * noise, rows[-1], scalar(4), scalar(0))[0])


def test_a_model_without_learned_variance_uses_the_posterior(fixture):
    torch.manual_seed(0)
    fixed = dataclasses.replace(TINY, learn_sigma=False)
    step = DenoiseStep(DiT(fixed).eval())
    schedule = make_schedule("8")
    x, noise, row = fixture["in.z"], fixture["ddpm.noise"][0, :2], rows_of("ddpm")[2]
    noisy, guided = step(fixture["in.y"], x, noise, row, scalar(1), scalar(0))
    still, _ = step(fixture["in.y"], x, 0 * noise, row, scalar(1), scalar(0))
    assert guided.shape == x.shape
    assert relative_l2(noisy - still, float(np.sqrt(schedule.posterior_variance[5])) * noise) <= 1e-5


def changed_rows(tag: str, name: str, index: int, value: float) -> torch.Tensor:
    rows = rows_of(tag).clone()
    rows[index, ROW_COLUMNS.index(name)] = value
    return rows


@pytest.mark.parametrize(
    ("tag", "rows"),
    [
        pytest.param("ddpm", changed_rows("ddpm", "learned", -1, 1.0), id="noise in the last step"),
        pytest.param("ddpm", changed_rows("ddpm", "learned", 3, 0.0), id="no noise in step 3"),
        pytest.param("ddpm", changed_rows("ddpm", "timestep", 2, 5.0), id="respaced timestep handed to the model"),
        pytest.param(
            "ddpm", torch.from_numpy(ddpm_rows(make_schedule("8"), learned_variance=False)), id="fixed variance"
        ),
        pytest.param("ddim", changed_rows("ddim", "eps_variance", 4, 0.0), id="no direction to x_t"),
    ],
)
def test_mutations_of_a_row_show(dit, fixture, tag, rows):
    assert max(play(DenoiseStep(dit), fixture, tag, rows)) > BROKEN


def test_mutation_guiding_all_channels_shows(dit, fixture):
    assert max(play(DenoiseStep(dit, guided_channels=4), fixture, "ddim")) > BROKEN


def test_modules_hold_no_state(dit):
    step = DenoiseStep(dit)
    assert not list(step.buffers())
    assert {name.removeprefix("embed.").removeprefix("update.") for name, _ in step.named_parameters()} == set(
        dit.state_dict()
    )


def test_one_program_serves_every_batch_and_both_samplers(dit, fixture):
    step = DenoiseStep(dit)
    y, x, noise = fixture["in.y"], fixture["in.z"], fixture["ddpm.noise"][0, :2]
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(
        step, (y, x, noise, rows_of("ddpm")[0], scalar(4), scalar(0)), dynamic_shapes=(batch,) * 3 + (None,) * 3
    ).module()
    for tag in LOOPS:
        for count in (1, 2, 5):
            y = torch.arange(count)
            x, noise = torch.randn(2, count, 4, 8, 8, generator=torch.Generator().manual_seed(count))
            args = (y, x, noise, rows_of(tag)[1], scalar(2.0), scalar(0.5))
            for got, want in zip(program(*args), step(*args), strict=True):
                assert relative_l2(got, want) <= RELATIVE_L2


# --- checkpoints ----------------------------------------------------------------------------------------------------


def published_names():
    return [name for name in published_lists() if name.startswith("dit_")]


def config_of(name: str) -> DiTConfig:
    size, patch, pixels = name.removesuffix("_diffusers").removeprefix("dit_").lower().split("_")
    return config(f"dit-{size}-{patch}-{pixels}")


def test_there_are_lists_for_every_published_size():
    assert len(published_names()) == 15


@pytest.mark.parametrize("name", published_names())
def test_published_layouts_load_strictly(name):
    published = published_lists()[name]
    with torch.device("meta"):
        module = DiT(config_of(name))
    check_layout(module, published_state(on_meta(published["shapes"]), module.config), "a DiT")
    if not name.endswith("_diffusers"):  # which counts the copies of the embedders
        assert sum(p.numel() for p in module.parameters()) == published["parameters"]
        for key in ("input_size", "patch_size", "hidden_size", "depth", "num_heads", "num_classes"):
            assert getattr(module.config, key) == published["config"][key]


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(InputError, match="did you mean 'dit-xl-2-256'"):
        config("dit-xl-2-265")
    with pytest.raises(InputError, match="num_heads 5"):
        DiTConfig(num_heads=5)
    with pytest.raises(InputError, match="patch_size 3"):
        DiTConfig(patch_size=3)
    with pytest.raises(InputError, match="multiple of 4"):
        DiTConfig(hidden_size=18, num_heads=3)
    assert len(CONFIGS) == 4 * 3 * 2 + 4


def test_what_does_not_fit_is_named(fixture):
    state = state_of(fixture)
    with pytest.raises(CheckpointError, match=r"missing: pos_embed"):
        build_dit(TINY, {k: v for k, v in state.items() if k != "pos_embed"})
    with pytest.raises(CheckpointError, match=r"unexpected: extra$"):
        build_dit(TINY, state | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 16, 64\), expected \(1, 64, 64\)"):
        build_dit(dataclasses.replace(TINY, input_size=16), state)
    with pytest.raises(CheckpointError, match=r"missing: .* and 7 more"):
        build_dit(dataclasses.replace(TINY, depth=3), state)
    with pytest.raises(CheckpointError, match="'opt' is no tensor"):
        build_dit(TINY, state | {"opt": 3})


def test_training_checkpoints_nest_the_average(dit, fixture):
    state = state_of(fixture)
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    nested = build_dit(TINY, {"model": other, "ema": state, "opt": {}, "args": None})
    assert all(torch.equal(a, b) for a, b in zip(nested.parameters(), dit.parameters(), strict=True))


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_bundled_checkpoints(depth):
    expected = tensors("zoo-expected-dit")
    model = build_dit(config(f"dit-c10-d{depth}"), checkpoint(f"dit-c10-d{depth}"))
    got = model(expected["dit.x"], expected["dit.t"], expected["dit.y"])
    assert got.dtype == torch.float32
    assert relative_l2(got, expected[f"dit-c10-d{depth}.out"]) <= RELATIVE_L2


# --- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers():
    """State dict, inputs and recorded outputs of diffusers' own module."""
    recorded = spec("dit-diffusers-tiny")
    seed, state = recorded["seed"], {}
    for key, shape in recorded["keys"].items():
        source = key.replace("blocks.1.norm1.emb", "blocks.0.norm1.emb")
        state[key] = torch.from_numpy(fill(seed, source, shape, recorded["rules"]))
    x = torch.from_numpy(np.float32(1.7) * unit(seed, "in.x", 512).reshape(2, 4, 8, 8))
    return state, x, torch.tensor([3, 10]), tensors("dit-diffusers-tiny")


SMALL = DiTConfig(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=4, num_classes=10)


def test_diffusers_weights_compute_the_same_where_the_semantics_agree(diffusers):
    state, x, y, out = diffusers
    ours, theirs = build_dit(SMALL, state), build_dit(dataclasses.replace(SMALL, frequency_denominator=127), state)
    # At t = 0 every frequency gives cos 0 and sin 0.
    assert relative_l2(ours(x, torch.tensor([0]), y), out["out.t0"]) <= RELATIVE_L2
    for t in (37, 999):
        assert relative_l2(theirs(x, torch.tensor([t]), y), out[f"out.t{t}"]) <= RELATIVE_L2
        assert relative_l2(ours(x, torch.tensor([t]), y), out[f"out.t{t}"]) > BROKEN


def test_diffusers_checkpoints_that_cannot_be_one_model_are_refused(diffusers):
    state = diffusers[0]
    copy = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(CheckpointError, match=r"blocks\.1\..*differs from .*blocks\.0\."):
        build_dit(SMALL, state | {copy: state[copy] + 1})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn1\.to_v\.bias is missing"):
        build_dit(SMALL, {k: v for k, v in state.items() if k != "transformer_blocks.1.attn1.to_v.bias"})
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.0\.attn1\.norm_q\.weight"):
        build_dit(SMALL, state | {"transformer_blocks.0.attn1.norm_q.weight": torch.ones(8)})


# --- published size -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_published_xl2():
    """675 M parameters from the hash recipe: 23 to 37 s and 3 GB on two cores, most of it the hash."""
    recorded, expected = spec("full-dit-xl2-256"), tensors("full-dit-xl2-256")
    xl = config("dit-xl-2-256")
    state = {"pos_embed": torch.from_numpy(position_table(xl.hidden_size, xl.grid_size))[None]}
    for key, shape in published_lists()["dit_XL_2_256"]["shapes"].items():
        values = fill(recorded["seed"], key, shape, recorded["rules"], recorded["key_prefix"])
        if values is not None:
            state[key] = torch.from_numpy(values)
    model = build_dit(xl, state)
    del state
    got = model(expected["in.x"], expected["in.t"], expected["in.y"])
    assert relative_l2(got, expected["out.forward"]) <= RELATIVE_L2
    got = model.forward_with_cfg(expected["in.cfg_x"], expected["in.cfg_t"], expected["in.y"], 4.0)
    assert relative_l2(got, expected["out.forward_with_cfg.4.0"]) <= RELATIVE_L2
