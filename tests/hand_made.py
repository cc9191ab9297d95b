"""Solutions made by hand: absmax of what flows into each layer and out of convolutions, as simple as can be."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from qexport.family import Generator
from qexport.quantize import assign_rules, output_specs, places_of
from qexport.recipe import Recipe
from qexport.reference.backend import TorchBackend, torch_player
from qexport.reference.interception import Interception
from qexport.runtime.inputs import label_input
from qexport.scheme import PerStep, PerToken
from qexport.solution import Activation, Solution


def solution_for(generator: Generator, recipe: Recipe, *, images: int = 2, seed: int = 5) -> Solution:
    """Activations of every layer that the recipe wants quantised inputs of: absmax, over one batch of trajectories."""
    rules = assign_rules(generator, recipe)
    wanted = {layer: rule.activation for layer, rule in rules.items() if rule.activation}
    places = places_of(generator, wanted)
    weights = {layer: generator.graph(graph).parameters()[name] for layer, (graph, name) in places.items()}
    low: dict[str, dict[int, float]] = defaultdict(dict)
    high: dict[str, dict[int, float]] = defaultdict(dict)
    player = torch_player(generator)
    backend = player.backend
    assert isinstance(backend, TorchBackend)
    step = 0

    def visit(name, x, window):
        low[name][step] = min(low[name].get(step, 0.0), float(x.min()))
        high[name][step] = max(high[name].get(step, 0.0), float(x.max()))
        return x

    made: dict[str, float] = defaultdict(float)

    def after(name, y):
        made[name] = max(made[name], float(y.abs().max()))
        return y

    def observe(record):
        nonlocal step
        call = player.plan.calls[record.call]
        table = next((s.removeprefix("row.") for s in call.inputs.values() if s.startswith("row.")), None)
        steps = generator.steps
        following = record.iteration + 1
        if steps is not None and table is not None and table in steps.index:
            index = steps.index[table]
            step = int(index[min(following, len(index) - 1)])
        else:
            step = following

    steps = generator.steps
    if steps is not None and steps.index:
        schedule = generator.plan.schedules[generator.plan.schedule]
        step = int(steps.index[schedule][0])
    port = label_input(player.plan)
    labels = {port.name: np.arange(images) % generator.entry.num_classes} if port else {}
    with Interception(weights, visit, after):
        player.play(labels, seed=seed, batch=images, observer=observe)

    found = {}
    for layer, spec in wanted.items():
        greatest = spec.format.greatest

        def scale(at, spec=spec, layer=layer, greatest=greatest):
            if spec.symmetric:
                return max(-low[layer][at], high[layer][at]) / greatest
            return (high[layer][at] - low[layer][at]) / (spec.format.code_max - spec.format.code_min)

        if isinstance(spec.scales, PerToken):
            found[layer] = Activation(spec, None)
        elif isinstance(spec.scales, PerStep):
            assert steps is not None
            found[layer] = Activation(spec, np.array([scale(at) for at in range(steps.count)], np.float32))
        else:
            low[layer] = {0: min(low[layer].values())}
            high[layer] = {0: max(high[layer].values())}
            zero = 0 if spec.symmetric else round(spec.format.code_min - low[layer][0] / scale(0))
            found[layer] = Activation(spec, np.array(scale(0), np.float32), zero)
    outputs = {
        layer: Activation(spec, np.array(made[layer] / spec.format.greatest, np.float32))
        for layer, spec in output_specs(generator, rules).items()
    }
    return Solution(activations=found, outputs=outputs)
