"""The student is what is exported: compared with the full-precision modules that have the stored weights written in."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from qexport.distill import Distillation, Samples
from qexport.distill import student as student_module
from qexport.distill.student import Student, layer_parameters
from qexport.distill.tasks import DenoiseTask, TokenTask
from qexport.errors import InputError
from qexport.family import Generator
from qexport.formats import get_format
from qexport.numerics.quantized import QuantizedTensor
from qexport.quantize import apply_stored, stored_weights
from qexport.recipe import Recipe, recipe_for
from qexport.reference import QuantisedModule
from qexport.scheme import ActivationSpec, PerStep, PerToken, Static, preset
from qexport.solution import Activation, Solution

TASK_LOSS = Distillation("forward")


def build(generator: Generator, recipe: Recipe, solution: Solution | None = None, **options: bool) -> Student:
    task = TokenTask(generator, TASK_LOSS)
    return Student(generator, recipe, solution or Solution(), task.predictor, task.place_steps, **options)


def stored_twin(generator: Generator, recipe: Recipe, solution: Solution) -> Generator:
    twin = copy.deepcopy(generator)
    apply_stored(twin, stored_weights(generator, recipe, solution))
    return twin


def nudge(student: Student) -> None:
    """As training would: everything moves a little."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator).clamp(-2, 2))


@pytest.mark.parametrize("bits", [2, 8])
def test_start_is_post_training_quantisation(tiny: Generator, tiny_tokens: Samples, bits: int) -> None:
    recipe = recipe_for(preset(bits), tiny.default_layers, "w", algorithm="mse")
    student = build(tiny, recipe)
    assert tiny.quality is not None
    want = stored_twin(tiny, recipe, Solution()).quality
    assert want is not None
    with torch.no_grad():
        torch.testing.assert_close(
            student(*tiny_tokens.tensors), want.teacher_forced_logits(*tiny_tokens.tensors), rtol=0, atol=0
        )


def test_start_has_the_codes_of_a_solution_that_rounding_would_not_give(tiny: Generator, tiny_w2: Recipe) -> None:
    """GPTQ's codes are not the nearest ones; here every fifth is one further."""
    layer = "blocks.0.ffn.fc1"
    start = {w.layer: w.value for w in stored_weights(tiny, tiny_w2) if isinstance(w.value, QuantizedTensor)}[layer]
    codes = start.codes.copy()
    codes.flat[::5] = np.clip(codes.flat[::5] + 1, -2, 1)
    shifted = QuantizedTensor(codes, start.scales, start.spec)
    student = build(tiny, tiny_w2, Solution(weights={layer: shifted}))
    weights = student.finish().weights
    np.testing.assert_array_equal(weights[layer].codes, codes)
    np.testing.assert_array_equal(weights[layer].scales, start.scales)
    latent = layer_parameters(student.generator, (layer,))[layer].detach().numpy()
    original = layer_parameters(tiny, (layer,))[layer].detach().numpy()
    kept = codes == start.codes
    np.testing.assert_array_equal(latent[kept], original[kept])
    np.testing.assert_array_equal(latent[~kept], shifted.dequantize()[~kept])


def test_finished_is_what_the_student_computes(tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples) -> None:
    student = build(tiny, tiny_w2)
    nudge(student)
    weights = student.finish().weights
    assert any((found.scales < 0).any() for found in weights.values())
    twin = stored_twin(tiny, tiny_w2, Solution(weights=weights)).quality
    assert twin is not None
    with torch.no_grad():
        found = student(*tiny_tokens.tensors)
        torch.testing.assert_close(found, twin.teacher_forced_logits(*tiny_tokens.tensors), rtol=0, atol=0)


def test_mutation_an_unrounded_scale_is_noticed(
    tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexport.distill.rounding.stored_scale", lambda scale: scale)
    with pytest.raises(AssertionError):
        test_finished_is_what_the_student_computes(tiny, tiny_w2, tiny_tokens)


@pytest.mark.parametrize("scales", [Static(), PerToken()])
def test_activations_are_the_twins(tiny: Generator, tiny_tokens: Samples, scales) -> None:
    spec = ActivationSpec(get_format("int8"), scales)
    recipe = recipe_for(replace(preset(4), activation=spec), tiny.default_layers, "w4a8")
    layers = [layer for layer in tiny.layers if layer.startswith("blocks.")]
    scale = np.array(0.02, np.float32) if isinstance(scales, Static) else None
    solution = Solution(activations={layer: Activation(spec, scale) for layer in layers})
    student = build(tiny, recipe, solution)
    twin = stored_twin(tiny, recipe, solution)
    weights = layer_parameters(twin, tuple(layers))
    quantised = QuantisedModule(twin.quality.var, {weights[layer]: solution.activations[layer] for layer in layers})  # type: ignore[union-attr]
    lengths = list(tiny.quality.scale_lengths)  # type: ignore[union-attr]
    with torch.no_grad():
        found = student(*tiny_tokens.tensors)
        by_scale = list(torch.split(tiny_tokens.tensors[1], lengths, dim=1))
        maps = twin.quality.vae.quantize.teacher_forcing_input(by_scale)  # type: ignore[union-attr]
        torch.testing.assert_close(found, quantised(tiny_tokens.tensors[0], maps), rtol=0, atol=0)
    plain = build(tiny, replace(recipe, rules=tuple(replace(rule, activation=None) for rule in recipe.rules)))
    assert not torch.equal(found, plain(*tiny_tokens.tensors))


def test_scales_of_steps_reach_their_positions(tiny: Generator, tiny_tokens: Samples) -> None:
    """With the scale of one step so great that everything rounds to 0, its positions change, and no earlier ones."""
    spec = ActivationSpec(get_format("int8"), PerStep())
    recipe = recipe_for(replace(preset(4), activation=spec), ("blocks.*.ffn.*",), "w4a8")
    steps = len(tiny.quality.scale_lengths)  # type: ignore[union-attr]
    fine = np.full(steps, 0.02, np.float32)
    coarse = fine.copy()
    coarse[1] = 1e6
    layers = [layer for layer in tiny.layers if ".ffn." in layer]
    outputs = []
    for scale in (fine, coarse):
        solution = Solution(activations={layer: Activation(spec, scale) for layer in layers})
        with torch.no_grad():
            outputs.append(build(tiny, recipe, solution)(*tiny_tokens.tensors))
    first = sum(list(tiny.quality.scale_lengths)[:1])  # type: ignore[union-attr]
    changed = (outputs[0] != outputs[1]).any(dim=-1).any(dim=0)
    assert not changed[:first].any()
    assert changed[first : first + 4].all()


def test_scales_of_steps_belong_to_timesteps(dit: Generator) -> None:
    """Of two samples only the one at timestep 700 changes with the scale of step 7, that of 700 … 799."""
    spec = ActivationSpec(get_format("int8"), PerStep())
    recipe = recipe_for(replace(preset(4), activation=spec), ("blocks.*.mlp.*",), "w4a8")
    layers = [layer for layer in dit.layers if ".mlp." in layer and layer.startswith("blocks")]
    coarse = np.where(np.arange(10) == 7, 1e6, 0.02).astype(np.float32)
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = (noisy, torch.tensor([3, 700]), torch.tensor([1, 2]))
    task, outputs = DenoiseTask(dit), []
    for scale in (np.full(10, 0.02, np.float32), coarse):
        solution = Solution(activations={layer: Activation(spec, scale) for layer in layers})
        with torch.no_grad():
            outputs.append(Student(dit, recipe, solution, task.predictor, task.place_steps)(*batch))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[0][1], outputs[1][1])


def test_learned_activation_scales_come_back(tiny: Generator) -> None:
    spec = ActivationSpec(get_format("int8"), Static())
    recipe = recipe_for(replace(preset(4), activation=spec), ("blocks.*.ffn.fc1",), "w4a8")
    layers = [layer for layer in tiny.layers if layer.endswith("ffn.fc1")]
    solution = Solution(activations={layer: Activation(spec, np.array(0.02, np.float32)) for layer in layers})
    student = build(tiny, recipe, solution)
    with torch.no_grad():
        student.activation_scales[1].fill_(0.05)
    activations = student.finish().activations
    assert [float(activations[layer].scale) for layer in layers] == pytest.approx([0.02, 0.05])  # type: ignore[arg-type]


def test_every_latent_and_scale_gets_a_gradient(
    tiny: Generator, dit: Generator, tiny_w2: Recipe, tiny_tokens: Samples
) -> None:
    student = build(tiny, tiny_w2)
    assert len(student.layers) == 10
    student(*(tensor[:2] for tensor in tiny_tokens.tensors)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())
    task = DenoiseTask(dit)
    recipe = recipe_for(preset(2), dit.default_layers, "w2", algorithm="mse")
    denoiser = Student(dit, recipe, Solution(), task.predictor, task.place_steps)
    noisy = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = (noisy, torch.tensor([3, 700]), torch.tensor([1, 2]))
    denoiser(*batch).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in denoiser.parameters())


def test_the_teacher_is_left_alone(tiny: Generator, tiny_w2: Recipe, tiny_tokens: Samples) -> None:
    before = {name: value.clone() for name, value in tiny.graph("step").parameters().items()}
    student = build(tiny, tiny_w2)
    nudge(student)
    student(*tiny_tokens.tensors).mean().backward()
    for name, value in tiny.graph("step").parameters().items():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_fixed_scales_stay(tiny: Generator, tiny_w2: Recipe) -> None:
    student = build(tiny, tiny_w2, learn_scales=False)
    assert not any(scale.requires_grad for scale in student.scales)


def test_nothing_to_train_is_said(tiny: Generator) -> None:
    with pytest.raises(InputError, match="quantises no matrix"):
        build(tiny, Recipe("none", ()))


def test_a_layer_that_is_never_reached_is_said(tiny: Generator, tiny_tokens: Samples) -> None:
    """The decoder is not part of teacher forcing; a weight that F.linear never sees cannot be trained."""
    recipe = recipe_for(preset(8), ("blocks.*", "word_embed"), "w8")
    student = build(tiny, recipe)
    student._predict = lambda labels, tokens: torch.zeros(1)
    with pytest.raises(InputError, match="layer 'word_embed' was never reached"):
        student(*tiny_tokens.tensors)
    assert student_module.trained_graph(tiny) == "step"
