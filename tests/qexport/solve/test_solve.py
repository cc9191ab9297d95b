"""The staged solver: what it finds, what it leaves in the model, and that it goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import tiny_llamagen
from torch import Tensor

from qexport import algorithms
from qexport.algorithms.rtn import rtn
from qexport.errors import InputError
from qexport.family import Generator
from qexport.formats import get_format
from qexport.numerics.quantized import QuantizedTensor
from qexport.numerics.statistics import InputStatistics
from qexport.pipeline import load_generator
from qexport.quantize import FEWEST_OUTPUTS, apply_stored, stored_weights
from qexport.recipe import Calibration, Recipe, Rule
from qexport.reference import Interception, Window, fake_quantise, layer_weights, torch_player
from qexport.scheme import ActivationSpec, PerChannel, PerGroup, PerStep, PerToken, Static, TensorSpec
from qexport.solution import Activation, Solution
from qexport.solve import needs_calibration, solve
from qexport.verify.trajectory import label_inputs

INT8, INT4 = get_format("int8"), get_format("int4")
W8, W4 = TensorSpec(INT8, PerChannel()), TensorSpec(INT4, PerGroup(32))
A8 = ActivationSpec(INT8)
SAME = 3e-6
"""Relative L2; see tests/models/test_folds.py."""
BATCH = 4
SOLVER = import_module("qexport.solve.solver")  # the package has a function of another name, its file this one


pytestmark = pytest.mark.usefixtures("one_thread")


class Spy:
    """Rounds to nearest, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: dict[str, InputStatistics] = {}

    def __call__(
        self,
        w_OI: npt.NDArray[np.float32],
        spec: TensorSpec,
        *,
        statistics: InputStatistics | None = None,
        name: str = "weight",
    ) -> QuantizedTensor:
        assert statistics is not None
        self.seen[name] = statistics
        return rtn(w_OI, spec, name=name)


def halving(
    weights: Sequence[npt.NDArray[np.float32]],
    specs: Sequence[TensorSpec],
    statistics: InputStatistics,
    *,
    activation: ActivationSpec | None = None,
    name: str = "input",
) -> npt.NDArray[np.float32]:
    """A smoother that hands half of the spread over (SmoothQuant's α = ½ without the weights)."""
    return np.sqrt(statistics.absmax_I / statistics.absmax_I.mean() + 0.1).astype(np.float32)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setitem(algorithms.ALGORITHMS, "spy", found)
    monkeypatch.setattr(import_module("qexport.solve.needs"), "NEEDS_INPUTS", frozenset({"spy"}))
    monkeypatch.setitem(algorithms.SMOOTHERS, "halving", halving)
    return found


def _recipe(*rules: Rule, samples: int = BATCH, seed: int = 3, schedule: str | None = None) -> Recipe:
    return Recipe("test", rules, calibration=Calibration(samples, seed, schedule))


def _played(
    generator: Generator,
    calibration: Calibration,
    quantised: Generator | None = None,
    activations: dict[str, Activation] | None = None,
) -> dict[str, list[Tensor]]:
    """Layer → inputs in every call of the generator's own trajectory, as `quantised` sees them with its own caches.

    The solver's stage by stage replay, computed the plain way: whole calls of the player.
    """
    records = []
    player = torch_player(generator)
    if calibration.schedule:
        player = player.with_schedule(calibration.schedule)
    player.play({"label": np.arange(calibration.samples) % 10}, seed=calibration.seed, observer=records.append)
    seen: dict[str, list[Tensor]] = {}
    model, caches = quantised or generator, {}
    given = activations or {}
    current = [0]

    def visit(layer: str, x: Tensor, window: Window | None) -> Tensor:
        seen.setdefault(layer, []).append(x)
        if layer not in given:
            return x
        scale = given[layer].scale
        stepped = scale is not None and scale.ndim
        return fake_quantise(x, given[layer], torch.from_numpy(scale)[current[0]] if stepped else None)

    backend = torch_player(model).backend
    with Interception(layer_weights(model), visit):
        for record in records:
            current[0] = record.iteration
            results = backend.run(record.graph, {**record.feeds, **caches}, tuple(record.results))
            caches = {f"past_{name}": value for name, value in results.items() if f"past_{name}" in record.feeds}
    return seen


def _gram(inputs: list[Tensor]) -> npt.NDArray[np.float64]:
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double().numpy()
    return rows.T @ rows


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


MODELS: dict[str, tuple[Callable[[], Generator], str | None, str]] = {
    "var-c10-d2": (lambda: load_generator("var-c10-d2"), None, "blocks.{}.*"),
    "dit-c10-d2": (lambda: load_generator("dit-c10-d2"), "ddim-10", "blocks.{}.*"),
    "llamagen-tiny": (tiny_llamagen, None, "layers.{}.*"),
}


@pytest.mark.parametrize("model", MODELS)
def test_each_block_sees_what_the_quantised_blocks_before_it_hand_on(model: str, spy: Spy) -> None:
    build, schedule, pattern = MODELS[model]
    rules = Rule(pattern.format(0), W4, "spy"), Rule(pattern.format(1), W8, "spy", activation=A8)
    recipe = _recipe(*rules, schedule=schedule)
    generator = build()
    solution = solve(generator, recipe)
    assert set(solution.weights) == set(spy.seen)
    first = {layer for layer in spy.seen if rules[0].matches(layer)}
    assert set(solution.activations) == set(spy.seen) - first

    plain = _played(build(), recipe.calibration)
    quantised = build()
    half = replace(recipe, rules=rules[:1])
    codes = Solution({layer: solution.weights[layer] for layer in first})
    parameters = {place: layer for layer, place in quantised.layers.items()}
    stored = (w for w in stored_weights(quantised, half, codes) if parameters.get((w.graph, w.name)) in first)
    apply_stored(quantised, list(stored))
    rounded = _played(build(), recipe.calibration, quantised)
    for layer, statistics in spy.seen.items():
        want = plain if layer in first else rounded
        assert _relative(statistics.gram_II, _gram(want[layer])) < 1e-4, layer
        assert statistics.count == sum(x.shape[:-1].numel() for x in want[layer])
        assert statistics.absmax_I.max() == pytest.approx(max(float(x.abs().max()) for x in want[layer]), rel=1e-4)
    others = [layer for layer in spy.seen if layer not in first]
    assert (
        max(_relative(_gram(plain[layer]), _gram(rounded[layer])) for layer in others) > 1e-3
    )  # else the two could not be told apart


@pytest.mark.parametrize("model", MODELS)
def test_smoothing_is_folded_in_and_the_rest_is_left_as_it_was(model: str, spy: Spy) -> None:
    build, schedule, _ = MODELS[model]
    pattern = "layers.*" if model == "llamagen-tiny" else "blocks.*"
    recipe = _recipe(Rule(pattern, W8, "spy", "halving", A8), schedule=schedule)
    generator, plain = build(), build()
    solution = solve(generator, recipe)
    before, after = _played(plain, recipe.calibration), _played(plain, recipe.calibration, generator)
    used = [fold for fold in generator.folds if fold.name in solution.smooth]
    factors = {layer: solution.smooth[fold.name] for fold in used for layer in fold.layers}
    foldable = {layer for fold in generator.folds for layer in fold.layers}
    assert set(factors) == {layer for layer in foldable if recipe.rules[0].matches(layer)}
    for layer, inputs in after.items():
        factor = torch.from_numpy(factors[layer]) if layer in factors else 1
        for got, want in zip(inputs, before[layer], strict=True):
            assert (got - want / factor).norm() <= SAME * (want / factor).norm(), layer
    first = next(layer for layer in spy.seen if layer in factors)  # of the first block: nothing is rounded before it
    assert _relative(spy.seen[first].gram_II, _gram(after[first])) < 1e-4


def test_codes_come_out_of_the_folded_model_again(spy: Spy) -> None:
    """`stored_weights` of what `solve` leaves gives the weights that the solver went on with."""
    stepped = ActivationSpec(INT8, PerStep())
    recipe = _recipe(Rule("blocks.*.fc2", W4, "spy", None, A8), Rule("blocks.*", W4, "rtn", "halving", stepped))
    generator, folded = load_generator("var-c10-d2"), load_generator("var-c10-d2")
    solution = solve(generator, recipe)
    assert set(solution.weights) == {"blocks.0.ffn.fc2", "blocks.1.ffn.fc2"}
    again = solve(folded, recipe)
    weights = {w.layer: w for w in stored_weights(generator, recipe, solution) if w.rule}
    for weight in stored_weights(folded, recipe, again):
        if weight.rule:
            np.testing.assert_array_equal(weight.restored(), weights[weight.layer].restored())
    for layer, activation in solution.activations.items():
        assert activation.scale is not None
        assert activation.scale.shape == (() if layer.endswith("fc2") else (7,))


def _arrays(solution: Solution) -> dict[str, np.ndarray]:
    found = {f"smooth {name}": factor for name, factor in solution.smooth.items()}
    for name, weight in solution.weights.items():
        found |= {f"codes {name}": weight.codes, f"scales {name}": weight.scales}
    for name, activation in solution.activations.items():
        found |= {f"scale {name}": np.asarray(activation.scale), f"zero {name}": np.asarray(activation.zero_point)}
    return found


def _same(one: Solution, other: Solution) -> bool:
    """To the bit, and in the same order."""
    ours, theirs = _arrays(one), _arrays(other)
    return list(ours) == list(theirs) and all(np.array_equal(array, theirs[name]) for name, array in ours.items())


EVERYTHING = Rule("blocks.*", W4, "spy", "halving", A8)


def test_the_same_seed_gives_the_same_and_another_does_not(spy: Spy) -> None:
    solutions = [solve(load_generator("var-c10-d2"), _recipe(EVERYTHING, seed=seed)) for seed in (3, 3, 4)]
    assert _same(solutions[0], solutions[1])
    assert not _same(solutions[0], solutions[2])


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(
    killed_at: int, spy: Spy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(EVERYTHING, Rule("decode/decoder.conv_out", W8, activation=ActivationSpec(INT8, symmetric=False)))
    whole = load_generator("var-c10-d2")
    want = solve(whole, recipe)
    stage, solved = SOLVER.solve_stage, []

    def counted(*args: object, limit: int | None = None) -> object:
        if len(solved) == limit:
            raise KeyboardInterrupt
        solved.append(args)
        return stage(*args)

    monkeypatch.setattr(SOLVER, "solve_stage", lambda *args: counted(*args, limit=killed_at))
    with pytest.raises(KeyboardInterrupt):
        solve(load_generator("var-c10-d2"), recipe, work=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("stage-*"))) == killed_at
    monkeypatch.setattr(SOLVER, "solve_stage", counted)
    generator = load_generator("var-c10-d2")
    got = solve(generator, recipe, work=tmp_path)
    assert len(solved) == 5  # embedding, two blocks, head, decoder: each once over both runs
    assert _same(got, want)
    for spec in generator.graphs:
        for name, value in spec.parameters().items():
            assert torch.equal(value, whole.graph(spec.name).parameters()[name]), name
    assert _same(solve(load_generator("var-c10-d2"), recipe, work=tmp_path), want)
    assert len(solved) == 5


def test_results_of_another_recipe_are_not_found_and_damage_is_said(spy: Spy, tmp_path: Path) -> None:
    solve(load_generator("var-c10-d2"), _recipe(EVERYTHING), work=tmp_path)
    (folder,) = tmp_path.iterdir()
    solve(load_generator("var-c10-d2"), _recipe(EVERYTHING, seed=9), work=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    path = folder / "stage-001.safetensors"
    assert "codes/blocks.0.attn.mat_qkv" in load_file(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"stage-001\.safetensors: is damaged"):
        solve(load_generator("var-c10-d2"), _recipe(EVERYTHING), work=tmp_path)


def test_what_needs_no_inputs_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the model was sampled")

    monkeypatch.setattr(SOLVER, "record", refuse)
    generator = load_generator("var-c10-d2")
    for algorithm in ("rtn", "mse"):
        rule = Rule("blocks.*", W4, algorithm)
        assert not needs_calibration([rule])
        assert solve(generator, _recipe(rule)) == Solution()
    rule = Rule("blocks.*", W4, activation=ActivationSpec(INT8, PerToken()))
    assert needs_calibration([rule])
    found = solve(generator, _recipe(rule))
    assert all(activation.scale is None for activation in found.activations.values())
    assert set(found.activations) == {layer for layer in generator.layers if layer.startswith("blocks.")}


def test_activations_are_measured_in_quantised_company() -> None:
    """Static scales cover what flows; scales per step follow it; doubled ones would not."""
    recipe = _recipe(Rule("blocks.*", W8, activation=ActivationSpec(INT8, Static(), observer="minmax")))
    generator = load_generator("var-c10-d2")
    solution = solve(generator, recipe)
    inputs = _played(generator, recipe.calibration)
    for layer, activation in solution.activations.items():
        assert activation.scale is not None
        reach = max(float(x.abs().max()) for x in inputs[layer])
        assert float(activation.scale) * 127 == pytest.approx(reach, rel=0.05), layer
    stepped = _recipe(Rule("blocks.*", W8, activation=ActivationSpec(INT8, PerStep(), observer="minmax")))
    for layer, activation in solve(load_generator("var-c10-d2"), stepped).activations.items():
        assert activation.scale is not None
        for scale, x in zip(activation.scale, inputs[layer], strict=True):
            assert float(scale) * 127 == pytest.approx(float(x.abs().max()), rel=0.1), layer


def test_the_decoder_is_solved_alone(spy: Spy) -> None:
    generator = load_generator("dit-c10-d2")
    recipe = _recipe(Rule("decode/*", W8, activation=A8), samples=2, schedule="ddim-10")
    solution = solve(generator, recipe)
    assert set(solution.activations) == set(generator.decoder_layers)
    recipe = _recipe(Rule("decode/decoder.conv_in", W8, "spy"), samples=2, schedule="ddim-10")
    solve(generator, recipe)
    weight = layer_weights(generator)["decode/decoder.conv_in"]
    assert spy.seen["decode/decoder.conv_in"].gram_II.shape == (weight[0].numel(),) * 2


def test_outputs_of_convolutions_are_measured_bias_and_all() -> None:
    """Of the decoder in full precision, which is one stage; not of matrices, nor where there are few channels."""
    generator = load_generator("dit-c10-d2")
    asked = ActivationSpec(INT8, observer="minmax", outputs=True)
    recipe = _recipe(Rule("decode/*", W8, activation=asked), samples=2, schedule="ddim-10")
    made: dict[str, float] = {}

    def after(layer: str, y: Tensor) -> Tensor:
        made[layer] = max(made.get(layer, 0.0), float(y.abs().max()))
        return y

    weights = layer_weights(generator)
    decoder = {layer: weights[layer] for layer in generator.decoder_layers}
    player = torch_player(generator).with_schedule("ddim-10")
    with Interception(decoder, lambda layer, x, window: x, after):
        player.play(label_inputs(player.plan, np.arange(2)), seed=recipe.calibration.seed, batch=2)
    solution = solve(generator, recipe)
    wide = {layer for layer, weight in decoder.items() if weight.ndim == 4 and weight.shape[0] >= FEWEST_OUTPUTS}
    assert set(solution.outputs) == wide
    assert 3 in {weight.shape[0] for weight in decoder.values()}  # the picture's own convolution is left out
    for layer, output in solution.outputs.items():
        assert output.scale is not None
        assert float(output.scale) * 127 == pytest.approx(made[layer], rel=1e-4), layer
        assert output.spec == ActivationSpec(INT8, observer="minmax")


def test_wrong_wishes_are_one_line(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator("var-c10-d2")
    with pytest.raises(InputError, match=r"rule 1: 'blocks.\*.fc2' has no layer before which halving could be folded"):
        solve(generator, _recipe(Rule("blocks.*.fc2", W8, smooth="halving")))
    broken = load_generator("var-c10-d2")
    with torch.no_grad():
        broken.graph("step").parameters()["blocks.1.ffn.fc1.bias"][3] = torch.nan
    with pytest.raises(InputError, match=r"blocks\.1\.ffn\.fc2: its input holds NaN or infinity"):
        solve(broken, _recipe(Rule("blocks.*.fc2", W8, activation=A8)))
    tiny = tiny_llamagen()
    monkeypatch.setitem(algorithms.SMOOTHERS, "other", halving)
    rules = Rule("*.w1", W8, smooth="halving"), Rule("*.w3", W8, smooth="other")
    with pytest.raises(InputError, match="share their input, but are to be smoothed differently"):
        solve(tiny, _recipe(*rules))


def test_a_layer_the_trajectories_never_reach_is_named(spy: Spy) -> None:
    generator = load_generator("var-c10-d2")
    generator = replace(generator, layers={**generator.layers, "class_emb": ("step", "class_emb.weight")})
    with pytest.raises(InputError, match="layer 'class_emb' was never reached"):
        solve(generator, _recipe(Rule("class_emb", W8, "spy")))
