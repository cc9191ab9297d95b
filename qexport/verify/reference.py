"""The models that a bundle is compared with: the full-precision one it was made of, and its quantised torch twin.

The twin is the reference of parity. It holds what the recipe in the bundle makes of the checkpoint, computed anew, so a
bundle whose files were exchanged does not get to say what is right.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qexport.bundle import Bundle, ModelInfo
from qexport.errors import CheckpointError, InputError
from qexport.family import Generator, find_model, load_random, random_seed
from qexport.plan import Plan
from qexport.quantize import StoredWeight, apply_stored, stored_weights
from qexport.recipe import Recipe
from qexport.verify.checks import NOWHERE, Check, Place, at_most
from qexport.verify.weights import Layer


@dataclass(frozen=True)
class Models:
    """`full` precision, `quantised` reference, and the layers that the recipe quantises."""

    full: Generator
    quantised: Generator
    layers: list[Layer]


def load_models(
    bundle: Bundle, generator: Generator | None, checkpoint: str | None, vae_checkpoint: str | None
) -> Models | str:
    """Load both models, or say in words why the rungs that need them are skipped.

    Args:
        bundle: names the model, and holds the recipe and the hashes of the checkpoint files.
        generator: the full-precision model, if it is loaded already; it is not changed.
        checkpoint: file of the generator's weights, where it is neither bundled nor downloaded.
        vae_checkpoint: file of the decoder's weights.

    Raises:
        CheckpointError: a file that was named explicitly cannot be used.
    """
    if generator is None:
        try:
            generator = _load(bundle.manifest.model, checkpoint, vae_checkpoint)
        except InputError as error:
            if isinstance(error, CheckpointError) and (checkpoint or vae_checkpoint):
                raise
            return str(error)
    reason = _other_checkpoint(generator.checkpoint_sha256, bundle.manifest.checkpoints)
    if reason:
        return reason
    try:
        recipe = Recipe.from_toml(bundle.path / bundle.manifest.recipe)
        quantised = copy.deepcopy(generator)
        layers: list[Layer] = []
        apply_stored(quantised, _noting_layers(generator, recipe, layers))
    except InputError as error:
        return f"the recipe in the bundle cannot be replayed: {error}"
    return Models(generator, quantised, layers)


def _load(model: ModelInfo, checkpoint: str | None, vae_checkpoint: str | None) -> Generator:
    seed = random_seed(model.source)
    if seed is not None:
        return load_random(model.name, seed)
    family, entry = find_model(model.name)
    return family.load(entry, checkpoint, vae_checkpoint)


def check_plan(bundle: Bundle, reference: Generator) -> Check:
    """Whether the bundle's sampling plan and its tables are the model's. The figure counts what differs."""
    ours, theirs = _plain(reference.plan), _plain(bundle.plan)
    different = [f"plan.{key}" for key in ours if ours[key] != theirs.get(key)]
    tables = bundle.tables()
    for name, wanted in reference.tables.items():
        if name not in tables or not np.array_equal(tables[name], wanted) or tables[name].dtype != wanted.dtype:
            different.append(f"table {name}")
    detail = f"{', '.join(different[:3])}" if different else f"the same, with {len(tables)} tables"
    place = Place(node=different[0]) if different else NOWHERE
    return at_most("sampling plan: parts that differ", len(different), 0, place, detail, "parts")


def _noting_layers(generator: Generator, recipe: Recipe, layers: list[Layer]) -> Iterator[StoredWeight]:
    for weight in stored_weights(generator, recipe):
        if _is_quantised(weight):
            layers.append(Layer(weight.layer or weight.name, weight.graph, weight.name))
        yield weight


def _is_quantised(weight: StoredWeight) -> bool:
    return weight.rule is not None and weight.rule.weight is not None


def _other_checkpoint(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    for role, digest in wanted.items():
        if found.get(role) != digest:
            return (
                f"the {role} checkpoint at hand (SHA-256 {str(found.get(role))[:12]}…) is not the one that the bundle "
                f"was made of ({digest[:12]}…)"
            )
    return ""


def _plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it, without the places of its tables."""
    data = json.loads(json.dumps(plan.to_json()))
    data["tables"] = {name: (table["dtype"], table["shape"]) for name, table in data["tables"].items()}
    return data
