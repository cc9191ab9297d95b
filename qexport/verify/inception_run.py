"""Score images: Inception once over all of them, then FID against real ones and the Inception Score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.family import INCEPTION
from qexport.verify.checks import Progress
from qexport.verify.fd import FrechetResult, frechet
from qexport.verify.inception import FEATURES, LOGITS, WEIGHTS, InceptionExtractor, load_inception
from qexport.verify.inception_figures import SPLITS, InceptionScore, inception_score
from qexport.verify.inception_images import open_pictures
from qexport.verify.statistics import Moments, Statistics, read_statistics

BATCH = 50
"""Images at a time: 1.3 GB in the widest layer."""


@dataclass(frozen=True)
class Scores:
    """What images scored.

    `fid` is None where no reference was given; `features` names what both are measured in. `statistics` are those of
    the images themselves. `notes` say what a reader of the figures has to know.
    """

    images: str
    size: tuple[int, int]
    fid: FrechetResult | None
    inception_score: InceptionScore
    reference: str | None
    weights_sha256: str
    features: str
    statistics: Statistics
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """``FID``, or ``FD`` with other weights."""
        return "FID" if self.published else "FD"

    @property
    def published(self) -> bool:
        """Whether the weights are the ones that FID is defined by."""
        return self.features == INCEPTION

    def to_json(self) -> dict[str, Any]:
        """Plain data; the distance stands under the name that it deserves."""
        found: dict[str, Any] = {"images": self.images, "n": self.inception_score.images}
        found |= {"height": self.size[0], "width": self.size[1]}
        if self.fid is not None:
            found[self.label.lower()] = self.fid.to_json()
        found |= {"inception_score": self.inception_score.to_json(), "reference": self.reference}
        found |= {"weights_sha256": self.weights_sha256, "weights_published": self.published}
        return found | {"notes": list(self.notes)}


def score(
    images: Sequence[Path],
    inception: Path | InceptionExtractor,
    reference: Sequence[Path] = (),
    *,
    splits: int = SPLITS,
    batch: int = BATCH,
    seed: int = 0,
    provider: str = "auto",
    progress: Progress | None = None,
) -> Scores:
    """Score images; see `qexport.verify.inception_images` for where they may lie.

    Args:
        images: files and folders, together one set.
        inception: file of the weights, or the network itself.
        reference: one file of statistics, or files and folders of real images; nothing leaves FID out.
        splits: parts of the Inception Score.
        batch: images at a time.
        seed: of the bootstrap.
        provider: where the network runs, see `load_inception`.
        progress: told how far it is.

    Raises:
        InputError: a file is missing, damaged or does not fit; images and reference differ in size.
    """
    tell = progress or (lambda stage, done, total: None)
    pictures = open_pictures(images)
    if splits < 1 or pictures.count < 2 * splits:
        raise InputError(f"{pictures.source}: {pictures.count} images; IS in {splits} parts needs {2 * max(splits, 1)}")
    _check_there(reference)
    tell("network", 0, 1)
    extractor = inception if isinstance(inception, InceptionExtractor) else load_inception(inception, provider)
    real = _statistics(reference, extractor, pictures.size, batch, tell) if reference else extractor.reference
    features_ND = np.empty((pictures.count, FEATURES), np.float32)
    logits_NC = np.empty((pictures.count, LOGITS), np.float32)
    moments, done = Moments(FEATURES), 0
    for pixels in pictures.batches(batch):
        stop = done + len(pixels)
        features_ND[done:stop], logits_NC[done:stop] = extractor.observe(pixels)
        moments.add(features_ND[done:stop])
        done = stop
        tell("images", done, pictures.count)
    tell("figures", 0, 1)
    fid = None if real is None else frechet(features_ND, real, extractor.name, seed)
    return Scores(
        pictures.source,
        pictures.size,
        fid,
        inception_score(logits_NC, splits, seed),
        None if real is None else _source(real),
        extractor.weights_sha256,
        extractor.name,
        moments.result(pictures.source),
        tuple(_notes(pictures.count, real, extractor)),
    )


def open_extractor(
    inception: Path,
    reference: Sequence[Path],
    size: tuple[int, int],
    *,
    batch: int = BATCH,
    provider: str = "auto",
    progress: Progress | None = None,
) -> InceptionExtractor:
    """The network with the statistics of real images, to be handed to what takes a `qexport.family.FeatureExtractor`.

    Args:
        inception: file of the weights.
        reference: as of `score`; at least one.
        size: height and width of the images that will be judged.
        batch: images at a time.
        provider: see `load_inception`.
        progress: told how far it is.

    Raises:
        InputError: a file is missing, damaged or does not fit.
    """
    _check_there(reference)
    extractor = load_inception(inception, provider)
    tell = progress or (lambda stage, done, total: None)
    extractor.reference = _statistics(reference, extractor, size, batch, tell)
    return extractor


def _check_there(reference: Sequence[Path]) -> None:
    for path in reference:
        if not path.exists():
            raise InputError(f"--reference {path}: no such file or folder")


def _statistics(
    reference: Sequence[Path], extractor: InceptionExtractor, size: tuple[int, int], batch: int, tell: Progress
) -> Statistics:
    """Those in a file, or those of real images of that size."""
    found = [read_statistics(path, FEATURES, extractor.weights_sha256) for path in reference]
    if len(found) > 1 and any(found):
        raise InputError("--reference: one file of statistics, or files and folders of images, not both")
    if found and found[0] is not None:
        return found[0]
    real = open_pictures(reference)
    if real.size != size:
        sides = f"{real.size[1]}×{real.size[0]}, those to judge {size[1]}×{size[0]}"
        raise InputError(
            f"--reference {real.source}: images are {sides}; resize them as the model's were, "
            "or pass published statistics"
        )
    moments, done = Moments(FEATURES), 0
    for pixels in real.batches(batch):
        moments.add(extractor.observe(pixels)[0])
        done += len(pixels)
        tell("reference", done, real.count)
    return moments.result(real.source)


def _source(real: Statistics) -> str:
    return real.source if real.images is None else f"{real.images:,} images of {real.source}"


def _notes(count: int, real: Statistics | None, extractor: InceptionExtractor) -> list[str]:
    notes = []
    if not extractor.published:
        notes.append(f"these are not the published weights ({WEIGHTS}): neither distance nor score is FID or IS")
    if real is None:
        return notes
    sides = (("", count), ("real ", real.images))
    notes += [
        f"{n:,} {which}images leave a covariance of {FEATURES:,} features with rank {n - 1:,}: the distance is far too "
        "large; compare it only with one from as many images"
        for which, n in sides
        if n is not None and n <= FEATURES
    ]
    return notes
