"""Images to calibrate on in place of the model's own samples: which of them, and that they are those of the recipe.

They are drawn without repetition under the recipe's seed, classes in turn as evenly as there are images of them. The
recipe names the file and the SHA-256 of what was drawn: the labels as little-endian int64, then the pixels as uint8
(n, H, W, 3), decoded. So a folder and an .npz of the same images are the same, and a path decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from qexport.calibrate import require_encoder
from qexport.errors import InputError
from qexport.family import Generator
from qexport.quantize import assign_rules
from qexport.recipe import Calibration, CalibrationImages, Recipe
from qexport.request import Request
from qexport.solve.needs import needs_inputs
from qexport.verify.images import ImageSet, open_images

OPTION = "--calibration-data"


def on_images(generator: Generator, request: Request, path: Path) -> Request:
    """The request, to be calibrated on images of `path` (`qexport.verify.images` says what that may be).

    They are looked at here, and decoded once for the hash: what cannot be used is said before anything slow.

    Raises:
        InputError: images that cannot be used, fewer than were asked for, a model without an encoder, or a method that
            looks at no inputs.
    """
    recipes = [request.recipe(generator, method) for method in request.compare or (request.method,)]
    _require_wanted(generator, recipes, path)
    images = _opened(generator, path)
    wanted = recipes[0].calibration
    if len(images) < wanted.samples:
        if request.samples is not None:
            raise InputError(f"{OPTION} {path}: holds {len(images)} images; {request.samples} samples were asked for")
        wanted = replace(wanted, samples=len(images))
    return replace(request, samples=wanted.samples, images=_drawn(images, path, wanted))


def of_recipe(generator: Generator, recipe: Recipe, path: Path | None) -> Recipe:
    """The recipe with the images that it names, where it names any.

    Raises:
        InputError: images that cannot be used or are not those of the recipe; named and not given, or the reverse.
    """
    named = recipe.calibration.images
    if path is None:
        if named is None or named.load is not None:
            return recipe
        raise InputError(
            f"recipe {recipe.name!r} is calibrated on images of {named.name!r}; say where they are by {OPTION} PATH"
        )
    if named is None:
        raise InputError(
            f"{OPTION} {path}: recipe {recipe.name!r} is calibrated on the model's own samples; leave it out, or write "
            f'images = "{path.name}" under [calibration]'
        )
    _require_wanted(generator, [recipe], path)
    images, wanted = _opened(generator, path), recipe.calibration
    if len(images) < wanted.samples:
        raise InputError(f"{OPTION} {path}: holds {len(images)} images; recipe {recipe.name!r} takes {wanted.samples}")
    drawn = _drawn(images, path, wanted)
    if named.sha256 not in (None, drawn.sha256):
        raise InputError(
            f"{OPTION} {path}: not the images that recipe {recipe.name!r} was made with (images_sha256 differs); give "
            "those, or take images_sha256 out of it"
        )
    return replace(recipe, calibration=replace(wanted, images=drawn))


def _opened(generator: Generator, path: Path) -> ImageSet:
    require_encoder(generator)
    return open_images(path, size=generator.entry.image_size, num_classes=generator.entry.num_classes)


def _drawn(images: ImageSet, path: Path, calibration: Calibration) -> CalibrationImages:
    chosen = chosen_of(images.labels, calibration.samples, calibration.seed)
    for i in chosen:
        images.check(int(i))
    labels = np.ascontiguousarray(images.labels[chosen], np.int64)
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    for i in chosen:
        digest.update(np.ascontiguousarray(images.load(int(i))).tobytes())

    def load(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([images.load(int(i)) for i in chosen[first:last]]), labels[first:last]

    return CalibrationImages(path.resolve().name, digest.hexdigest(), load)


def chosen_of(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Numbers (count,) of images with labels (n,): drawn under the seed, classes in turn while they last."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turns = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels[order] == label)
        turns[of_class] = np.arange(len(of_class))
    return order[np.argsort(turns, kind="stable")][:count]


def _require_wanted(generator: Generator, recipes: Collection[Recipe], path: Path) -> None:
    if not any(needs_inputs(rule) for recipe in recipes for rule in assign_rules(generator, recipe).values()):
        names = ", ".join(recipe.name for recipe in recipes)
        raise InputError(
            f"{OPTION} {path}: {names} looks at no inputs; leave it out, or choose a --method that does, or --abits 8"
        )
